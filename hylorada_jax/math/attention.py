"""Attention over the :class:`~hylorada_jax.math.pattern.Pattern` of a forward pass, for every model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.blockwise import BLOCK, blockwise_attention
from hylorada_jax.math.kernel_rows import tpu_kind
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.position import NUM_BUCKETS
from hylorada_jax.math.relative_bias import relative_bias
from hylorada_jax.math.remat import named_output
from hylorada_jax.math.soft_cap import soft_capped

log = logging.getLogger(__name__)


class DAA(NamedTuple):
    """Direct attention adaptation of one layer, S' = α·S + β + position_bias[bucket(q − k)].

    Attributes:
        alpha: α, per query head or one for all.
        beta: β; constant along every row of logits, so that the softmax does not see it.
        position_bias: a bias per bucket of distances and head, or None.
    """

    alpha: Float[Array, " heads_or_1"]
    beta: Float[Array, " heads_or_1"]
    position_bias: Float[Array, "buckets heads_or_1"] | None = None


def leaf_shapes(heads: int, *, position_bias: bool) -> dict[str, tuple[int, ...]]:
    """The trainable leaves of one layer's DAA, by name.

    Args:
        heads: how many have values of their own: all query heads, or 1.
        position_bias: it has one.

    Returns:
        {leaf name: shape}, in the order of :class:`DAA`.

    Example:
        >>> leaf_shapes(4, position_bias=True)
        {'alpha': (4,), 'beta': (4,), 'position_bias': (64, 4)}

    Source: method.md §3.
    """
    shapes: dict[str, tuple[int, ...]] = {"alpha": (heads,), "beta": (heads,)}
    return shapes | ({"position_bias": (NUM_BUCKETS, heads)} if position_bias else {})


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    pattern: Pattern,
    *,
    daa: DAA | None = None,
    bias: Float[Array, "batch_or_1 heads_or_1 query key"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Scaled dot-product attention with grouped heads; keys and values are never repeated.

        S = scale · α · q kᵀ,   S' = cap · tanh(S / cap) + β + position_bias[bucket(q − k)]
        softmax(S' + bias where visible) v          query head h reads key-value head ⌊h·kv_heads/heads⌋

    With a sink z for each query head, a row of the softmax has one logit more, whose value is zero:

        p_k = exp(S'_k) / (exp(z + β) + Σ_j exp(S'_j))

    ``jax.nn.dot_product_attention`` is the same formula without DAA, but takes its softmax in float32 even
    for float64 inputs; there its mask value turns to −∞, and a row without a visible key to NaN. Here a row
    without a visible key (padding) takes the mean of the values, which is finite and has finite gradients;
    with sinks, zeros.

    α multiplies the queries instead of the logits: the same in exact arithmetic, and the backward pass needs
    no second array of logits. In bfloat16 the product is rounded as the queries are, to 8 bits: an α within
    1/512 of 1 changes nothing yet.

    Args:
        query: queries.
        key: keys; heads is a multiple of kv_heads.
        value: values.
        pattern: which keys each query sees; its positions are read by DAA's position bias.
        daa: direct attention adaptation of this layer; without it α is 1, β and position_bias are 0.
        bias: added to the logits as it is (T5's relative bias).
        scale: of the logits; None takes 1/√head_dim.
        soft_cap: bound of the logits before anything is added to them (Gemma 2); None: none.
        sinks: a logit per query head (gpt-oss), which α and the soft cap leave alone; None: none.
        implementation: a key of :data:`IMPLEMENTATIONS`, which differ in cost alone; None takes the first
            that suits the lengths and has all that is asked for.

    Returns:
        The attended values in query's dtype; logits and softmax are in float32 at least.

    Raises:
        ConfigError: DAA has neither one value nor one per query head; or the implementation is unknown, or
            lacks something that is asked for.

    Source:
        Vaswani et al., arXiv:1706.03762 §3.2.1; grouped queries: Ainslie et al., arXiv:2305.13245 §2.2; the
        soft cap: Gemma Team, arXiv:2408.00118 §2; sinks: OpenAI, arXiv:2508.10925 §2.2; DAA: method.md §3.

    Example:
        >>> q = jnp.ones((1, 2, 4, 8)); kv = jnp.ones((1, 2, 2, 8))
        >>> attention(q, kv, kv, Pattern.of_rows(jnp.array([[0, 1]]))).shape
        (1, 2, 4, 8)
    """
    if daa is not None:
        check_heads(daa, query.shape[2])
    alpha, beta, table = (None, None, None) if daa is None else daa
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = Logits(scale, soft_cap, alpha, beta, table, bias, sinks)
    return _chosen(implementation, query, key, pattern, logits)(query, key, value, pattern, logits)


class Logits(NamedTuple):
    """What becomes of q kᵀ before the mask; see :func:`attention`."""

    scale: float
    soft_cap: float | None
    alpha: Float[Array, " heads_or_1"] | None
    beta: Float[Array, " heads_or_1"] | None
    position_bias: Float[Array, "buckets heads_or_1"] | None
    bias: Float[Array, "batch_or_1 heads_or_1 query key"] | None
    sinks: Float[Array, " heads"] | None


def _dense(query: Array, key: Array, value: Array, pattern: Pattern, logits: Logits) -> Array:
    """The formula as it is written, with all logits of a row at once."""
    batch, length, heads, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = _times_alpha(query, logits)
    additions = [] if logits.bias is None else [logits.bias]
    if logits.beta is not None:
        additions.append(logits.beta.astype(dtype)[:, None, None])
    if logits.position_bias is not None:
        table = logits.position_bias.astype(dtype)
        additions.append(relative_bias(table, pattern.query_positions, pattern.key_positions))
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=dtype)
    scores, _ = soft_capped(scores * logits.scale, logits.soft_cap)
    shape, mask = scores.shape, pattern.mask()
    if additions:
        # With all heads on one axis: split in two, a TPU would not fuse the bias into the softmax.
        scores = sum(additions, scores.reshape(batch, heads, *shape[3:]))
    else:
        mask = mask[:, :, None]
    # A finite number, so that a row with no visible key is uniform and not 0/0.
    scores = jnp.where(mask, scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if logits.sinks is not None:
        # What the sink leaves of a row: Σ_k exp(S_k) / (exp(z) + Σ_k exp(S_k)).
        sinks = logits.sinks.astype(dtype) + (0 if logits.beta is None else logits.beta.astype(dtype))
        sinks = sinks.reshape(*scores.shape[1:-2], 1, 1)
        weights = weights * jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1, keepdims=True) - sinks)
    weights = weights.astype(value.dtype).reshape(shape)
    return named_output(jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape))


def _blockwise(query: Array, key: Array, value: Array, pattern: Pattern, logits: Logits) -> Array:
    """β is left out: it adds one number to all logits of a row, which the softmax does not see."""
    query = _times_alpha(query, logits)
    return blockwise_attention(query, key, value, pattern, scale=logits.scale, **_facts(logits))


def _times_alpha(query: Array, logits: Logits) -> Array:
    """The queries as α leaves them."""
    if logits.alpha is None:
        return query
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    return (query * logits.alpha[:, None].astype(dtype)).astype(query.dtype)


def _splash(query: Array, key: Array, value: Array, pattern: Pattern, logits: Logits) -> Array:
    from hylorada_jax.math.splash import splash_attention  # what it imports has no use elsewhere

    scale, soft_cap, sinks = _scales(query, logits), logits.soft_cap, logits.sinks
    return splash_attention(query, key, value, pattern, scale=scale, soft_cap=soft_cap, sinks=sinks)


def _distance(query: Array, key: Array, value: Array, pattern: Pattern, logits: Logits) -> Array:
    from hylorada_jax.math.distance_attention import distance_attention

    return distance_attention(query, key, value, pattern, scale=_scales(query, logits), **_facts(logits))


def _scales(query: Array, logits: Logits) -> float | Array:
    """The scale of the logits, with α for each head: so that a kernel's queries are rounded once."""
    if logits.alpha is None:
        return logits.scale
    return jnp.broadcast_to(logits.alpha * logits.scale, query.shape[2:3])


def _facts(logits: Logits) -> dict[str, Any]:
    """What is asked for, without the scale, β and a bias of its own for every query and key."""
    return {
        "soft_cap": logits.soft_cap,
        "position_bias": logits.position_bias,
        "sinks": logits.sinks,
    }


def _on_tpu(query: Array, key: Array) -> bool:
    """Rows of a block at least, on a TPU whose kernels multiply bfloat16: those before v4 do not."""
    serves = tpu_kind() not in (None, "TPU v2", "TPU v3")
    return serves and min(query.shape[1], key.shape[1]) >= 128 and query.dtype != jnp.float64


def _kernel_lacks(pattern: Pattern, logits: Logits) -> str:
    """What no kernel for TPUs has."""
    if not pattern.own:
        return "keys of other tokens"
    return _blockwise_lacks(pattern, logits)


def _splash_lacks(pattern: Pattern, logits: Logits) -> str:
    if logits.position_bias is not None:
        return "position bias"
    traced = pattern.window is not None and not isinstance(pattern.window, int)
    return "window that is traced" if traced else _kernel_lacks(pattern, logits)


def _distance_lacks(pattern: Pattern, logits: Logits) -> str:
    if logits.position_bias is not None and not pattern.counted:
        return "bias by positions that may not be counted"
    return _kernel_lacks(pattern, logits)


def _blockwise_lacks(pattern: Pattern, logits: Logits) -> str:
    del pattern
    return "" if logits.bias is None else "a bias of its own for every query and key"


class Implementation(NamedTuple):
    """A way to compute :func:`attention`.

    Attributes:
        run: of query, key, value, pattern and logits.
        suits: whether it is worth while, by the shapes of query and key.
        lacks: what it does not have of what is asked for; "" where it has all.
    """

    run: Callable[[Array, Array, Array, Pattern, Logits], Array]
    suits: Callable[[Array, Array], bool]
    lacks: Callable[[Pattern, Logits], str]


# In the order of preference. On a CPU, forward and backward in blocks take 0.8 of dense attention's time at
# 512 tokens and 0.4 at 1024; one query and a long cache are linear as they are.
IMPLEMENTATIONS = {
    "splash": Implementation(_splash, _on_tpu, _splash_lacks),
    "distance": Implementation(_distance, _on_tpu, _distance_lacks),
    "blockwise": Implementation(
        _blockwise,
        lambda query, key: min(query.shape[1], key.shape[1]) > BLOCK,
        _blockwise_lacks,
    ),
    "dense": Implementation(_dense, lambda query, key: True, lambda pattern, logits: ""),
}


def _chosen(
    name: str | None, query: Array, key: Array, pattern: Pattern, logits: Logits
) -> Callable[..., Array]:
    """The function of an implementation; where none is named, of the first that serves."""
    if name is None:
        for name, one in IMPLEMENTATIONS.items():
            if one.suits(query, key):
                if not (missing := one.lacks(pattern, logits)):
                    return one.run
                log.debug("attention: not %s, which has no %s", name, missing.removeprefix("a "))
    if name not in IMPLEMENTATIONS:
        rule = f"implementation must be one of {', '.join(IMPLEMENTATIONS)}."
        raise ConfigError(rule, repr(name), "Leave it out to have it chosen.")
    if missing := IMPLEMENTATIONS[name].lacks(pattern, logits):
        raise ConfigError(
            f"implementation={name!r} does not have all that attention can be asked for.",
            missing,
            "Leave implementation out, or take 'dense'.",
        )
    return IMPLEMENTATIONS[name].run


def check_heads(daa: DAA, heads: int) -> None:
    """Refuse a DAA that is made for another number of heads; a ConfigError."""
    given = {name: leaf.shape for name, leaf in daa._asdict().items() if leaf is not None}
    if any(shape[-1] not in (1, heads) for shape in given.values()):
        raise ConfigError(
            "DAA has one value per query head, or one for all.",
            f"{given} for {heads} heads",
            f"Make it for num_heads={heads}.",
        )
