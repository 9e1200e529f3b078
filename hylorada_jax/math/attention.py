"""Attention over the :class:`~hylorada_jax.math.pattern.Pattern` of a forward pass, for every model."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.relative_bias import relative_bias


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
) -> Float[Array, "batch query heads head_dim"]:
    """Scaled dot-product attention with grouped heads; keys and values are never repeated.

        S = scale · α · q kᵀ,   S' = cap · tanh(S / cap) + β + position_bias[bucket(q − k)]
        softmax(S' + bias where visible) v          query head h reads key-value head ⌊h·kv_heads/heads⌋

    ``jax.nn.dot_product_attention`` is the same formula without DAA, but takes its softmax in float32 even
    for float64 inputs; there its mask value turns to −∞, and a row without a visible key to NaN. Here a row
    without a visible key (padding) takes the mean of the values, which is finite and has finite gradients.

    α multiplies the queries instead of the logits: the same in exact arithmetic, and the backward pass needs
    no second array of logits.

    Args:
        query: queries.
        key: keys; heads is a multiple of kv_heads.
        value: values.
        pattern: which keys each query sees; its positions are read by DAA's position bias.
        daa: direct attention adaptation of this layer; without it α is 1, β and position_bias are 0.
        bias: added to the logits as it is (T5's relative bias).
        scale: of the logits; None takes 1/√head_dim.
        soft_cap: bound of the logits before anything is added to them (Gemma 2); None: none.

    Returns:
        The attended values in query's dtype; logits and softmax are in float32 at least.

    Raises:
        ConfigError: DAA has neither one value nor one per query head.

    Source:
        Vaswani et al., arXiv:1706.03762 §3.2.1; grouped queries: Ainslie et al., arXiv:2305.13245 §2.2; the
        soft cap: Gemma Team, arXiv:2408.00118 §2; DAA: method.md §3.

    Example:
        >>> q = jnp.ones((1, 2, 4, 8)); kv = jnp.ones((1, 2, 2, 8))
        >>> attention(q, kv, kv, Pattern.of_rows(jnp.array([[0, 1]]))).shape
        (1, 2, 4, 8)
    """
    batch, length, heads, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    additions = [] if bias is None else [bias]
    if daa is not None:
        check_heads(daa, heads)
        query = (query * daa.alpha[:, None].astype(dtype)).astype(query.dtype)
        additions.append(daa.beta.astype(dtype)[:, None, None])
        if daa.position_bias is not None:
            table = daa.position_bias.astype(dtype)
            additions.append(relative_bias(table, pattern.query_positions, pattern.key_positions))
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=dtype)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    shape, mask = logits.shape, pattern.mask()
    if additions:
        # With all heads on one axis: split in two, a TPU would not fuse the bias into the softmax.
        logits = sum(additions, logits.reshape(batch, heads, *shape[3:]))
    else:
        mask = mask[:, :, None]
    # A finite number, so that a row with no visible key is uniform and not 0/0.
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype).reshape(shape)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)


def check_heads(daa: DAA, heads: int) -> None:
    """Refuse a DAA that is made for another number of heads; a ConfigError."""
    given = {name: leaf.shape for name, leaf in daa._asdict().items() if leaf is not None}
    if any(shape[-1] not in (1, heads) for shape in given.values()):
        raise ConfigError(
            "DAA has one value per query head, or one for all.",
            f"{given} for {heads} heads",
            f"Make it for num_heads={heads}.",
        )
