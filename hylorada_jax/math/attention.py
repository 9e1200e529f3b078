"""Attention: positions, the mask, and the functions that every model calls.

:func:`attention` is the formula; :func:`attend` applies it to the :class:`Pattern` of a forward pass: whole
rows, or groups of their tokens (shifted sparse attention).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.errors import ConfigError
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pattern:
    """Which keys each query sees, and where the tokens stand: made once per forward pass, not per layer.

    Attributes:
        mask: True where the query sees the key; the batch axis is 1 where all rows are alike.
        query_positions: position id of every query.
        key_positions: position id of every key.
        front: None where rows are attended to whole. Otherwise rows are cut into groups as long as the mask
            is wide, after padding by this much in front, and "batch" counts groups.
    """

    mask: Bool[Array, "batch_or_1 1 query key"]
    query_positions: Int[Array, "batch query"]
    key_positions: Int[Array, "batch key"]
    front: int | None = field(default=None, metadata={"static": True})


def default_positions(
    shape: tuple[int, ...],
    *,
    attention_mask: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Int[Array, "batch seq"]:
    """The position of every token when the caller gives none.

    Counted from the first token of the document with ``segment_ids``, from the first real token with
    ``attention_mask`` (padding in front is 0), else from the left.

    Args:
        shape: (batch, seq).
        attention_mask: 1 for a token, 0 for padding.
        segment_ids: the document of every token.

    Returns:
        int32 positions.

    Example:
        >>> default_positions((1, 4), attention_mask=jnp.array([[0, 1, 1, 1]])).tolist()
        [[0, 0, 1, 2]]
        >>> default_positions((1, 5), segment_ids=jnp.array([[1, 1, 2, 2, 2]])).tolist()
        [[0, 1, 0, 1, 2]]
    """
    slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is not None:
        new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        return slots - jax.lax.cummax(jnp.where(new, slots, 0), axis=1)
    if attention_mask is not None:
        return jnp.maximum(jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32) - 1, 0)
    return slots


def causal_mask(
    query_slots: Int[Array, " query"],
    key_slots: Int[Array, " key"],
    *,
    key_valid: Bool[Array, "batch key"] | None = None,
    segment_ids: Int[Array, "batch key"] | None = None,
    window: int | None = None,
) -> Bool[Array, "batch_or_1 1 query key"]:
    """Which keys each query sees; made once per forward pass, not per layer.

        key k is visible to query q:  k ≤ q,  q − k < window,  key_valid[k],  segment[q] = segment[k]

    Slots are places in the row (or in the KV cache): the order of the tokens decides, not their position ids.

    Args:
        query_slots: place of every query.
        key_slots: place of every key.
        key_valid: False for padding.
        segment_ids: the document of every token; only where queries and keys are the same tokens.
        window: a query sees itself and the window − 1 keys before it; None: all of them.

    Returns:
        True where the query sees the key; the batch axis is 1 where all rows are alike.

    Example:
        >>> slots = jnp.arange(3)
        >>> causal_mask(slots, slots, window=2)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = query_slots[:, None] - key_slots[None, :]
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    mask = mask[None, None]
    if key_valid is not None:
        mask = mask & key_valid[:, None, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return mask


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    mask: Bool[Array, "batch_or_1 1 query key"],
    *,
    daa: DAA | None = None,
    query_positions: Int[Array, "batch query"] | None = None,
    key_positions: Int[Array, "batch key"] | None = None,
    bias: Float[Array, "batch_or_1 heads_or_1 query key"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Scaled dot-product attention with grouped heads; keys and values are never repeated.

        S = scale · q kᵀ,   S' = α·S + β + position_bias[bucket(q − k)]          (with DAA)
        softmax(S' + bias where mask) v             query head h reads key-value head ⌊h·kv_heads/heads⌋

    ``jax.nn.dot_product_attention`` is the same formula without DAA, but takes its softmax in float32 even
    for float64 inputs; there its mask value turns to −∞, and a row without a visible key to NaN. Here a row
    without a visible key (padding) takes the mean of the values, which is finite and has finite gradients.

    α multiplies the queries instead of the logits: the same in exact arithmetic, and the backward pass needs
    no second array of logits.

    Args:
        query: queries.
        key: keys; heads is a multiple of kv_heads.
        value: values.
        mask: True where the query sees the key.
        daa: direct attention adaptation of this layer.
        query_positions: position ids, read by DAA's position bias.
        key_positions: the same of the keys.
        bias: added to the logits as it is (T5's relative bias).
        scale: of the logits; None takes 1/√head_dim.

    Returns:
        The attended values in query's dtype; logits and softmax are in float32 at least.

    Raises:
        ConfigError: DAA has neither one value nor one per query head, or a position bias and no positions.

    Source:
        Vaswani et al., arXiv:1706.03762 §3.2.1; grouped queries: Ainslie et al., arXiv:2305.13245 §2.2;
        DAA: method.md §3.

    Example:
        >>> q = jnp.ones((1, 2, 4, 8)); kv = jnp.ones((1, 2, 2, 8))
        >>> attention(q, kv, kv, causal_mask(jnp.arange(2), jnp.arange(2))).shape
        (1, 2, 4, 8)
    """
    batch, length, heads, head_dim = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    additions = [] if bias is None else [bias]
    if daa is not None:
        _check_heads(daa, heads)
        query = (query * daa.alpha[:, None].astype(dtype)).astype(query.dtype)
        additions.append(daa.beta.astype(dtype)[:, None, None])
        if daa.position_bias is not None:
            if query_positions is None or key_positions is None:
                raise ConfigError(
                    "DAA's position bias needs the positions of queries and keys.",
                    f"query_positions={query_positions}, key_positions={key_positions}",
                    "Pass the model's position ids.",
                )
            additions.append(relative_bias(daa.position_bias.astype(dtype), query_positions, key_positions))
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=dtype)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    shape = logits.shape
    if additions:
        # With all heads on one axis: split in two, a TPU would not fuse the bias into the softmax.
        logits = sum(additions, logits.reshape(batch, heads, *shape[3:]))
    else:
        mask = mask[:, :, None]
    # A finite number, so that a row with no visible key is uniform and not 0/0.
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype).reshape(shape)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)


def _check_heads(daa: DAA, heads: int) -> None:
    given = {name: leaf.shape for name, leaf in daa._asdict().items() if leaf is not None}
    if any(shape[-1] not in (1, heads) for shape in given.values()):
        raise ConfigError(
            "DAA has one value per query head, or one for all.",
            f"{given} for {heads} heads",
            f"Make it for num_heads={heads}.",
        )


def full_pattern(
    mask: Bool[Array, "batch_or_1 1 query key"],
    query_positions: Int[Array, "batch query"],
    key_positions: Int[Array, "batch key"],
) -> tuple[Pattern]:
    """The pattern of ordinary attention: every head sees whole rows, through ``mask``.

    Args:
        mask: from :func:`causal_mask`.
        query_positions: position id of every query.
        key_positions: position id of every key.

    Returns:
        One pattern, for all heads.
    """
    return (Pattern(mask, query_positions, key_positions),)


def shifted_patterns(
    positions: Int[Array, "batch seq"],
    group_size: int,
    shift: int,
    *,
    key_valid: Bool[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    window: int | None = None,
) -> tuple[Pattern, Pattern]:
    """The patterns of shifted sparse attention: groups of G tokens, and the same shifted, strictly causal.

        first heads:  [0, G), [G, 2G), …            last half of the heads:  [0, shift), [shift, shift + G), …

    A token sees the tokens of its group that are not later, of its own document, and no padding. Rows of any
    length: what a first or last group lacks is masked. LongLoRA rolls the tokens instead, and lets the last
    group's queries see the first tokens of the row across the wrap-around; here nothing wraps.

    Args:
        positions: position id of every token.
        group_size: G.
        shift: in tokens, 0 < shift < G.
        key_valid: False for padding.
        segment_ids: the document of every token.
        window: a query sees itself and the window − 1 keys before it; None: all of its group.

    Returns:
        The patterns of the plain and of the shifted groups, for :func:`attend`.

    Raises:
        ConfigError: the shift is not inside a group.

    Source: Chen et al. 2024 (LongLoRA), arXiv:2309.12307 §3.2.
    """
    if not 0 < shift < group_size:
        raise ConfigError(
            "Shifted groups begin inside a group: 0 < shift < group_size.",
            f"shift={shift}, group_size={group_size}",
            "Half of an even group_size is LongLoRA's choice.",
        )
    if key_valid is None:
        key_valid = jnp.ones(positions.shape, bool)
    slots = jnp.arange(group_size)

    def pattern(front: int) -> Pattern:
        segments = None if segment_ids is None else _to_groups(segment_ids, group_size, front)
        valid = _to_groups(key_valid, group_size, front)
        mask = causal_mask(slots, slots, key_valid=valid, segment_ids=segments, window=window)
        grouped = _to_groups(positions, group_size, front)
        return Pattern(mask, grouped, grouped, front)

    return pattern(0), pattern(group_size - shift)


def attend(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    patterns: tuple[Pattern, ...],
    daa: DAA | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """:func:`attention` over the pattern of a forward pass: the one call of every self-attention layer.

    Args:
        query: queries.
        key: keys.
        value: values.
        patterns: one pattern for all heads (:func:`full_pattern`), or two, the second for the last half of
            the heads (:func:`shifted_patterns`).
        daa: direct attention adaptation of this layer.
        scale: of the logits; None takes 1/√head_dim.

    Returns:
        The attended values in query's dtype.

    Raises:
        ConfigError: a single head cannot be halved.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if len(patterns) == 1:
        return _over(patterns[0], query, key, value, daa, scale)
    if heads < 2:
        raise ConfigError(
            "Shifted sparse attention halves the heads of a layer.", f"{heads} head", "Use full attention."
        )
    if daa is not None:
        _check_heads(daa, heads)
    outputs = []
    middle = heads - heads // 2
    for pattern, first, last in zip(patterns, (0, middle), (middle, heads), strict=True):
        # Where the cut is between two key-value heads each half takes its own; else every query head's.
        per_kv = heads // kv_heads
        shared = first % per_kv == last % per_kv == 0
        read = range(first // per_kv, last // per_kv) if shared else [h // per_kv for h in range(first, last)]
        half = jax.tree.map(lambda leaf, own=slice(first, last): _heads(leaf, own), daa)
        own = np.asarray(read)
        outputs.append(_over(pattern, query[:, :, first:last], key[:, :, own], value[:, :, own], half, scale))
    return jnp.concatenate(outputs, axis=2)


def _heads(leaf: Array, own: slice) -> Array:
    """What a leaf of DAA has for some of the heads."""
    return leaf if leaf.shape[-1] == 1 else leaf[..., own]


def _over(
    pattern: Pattern, query: Array, key: Array, value: Array, daa: DAA | None, scale: float | None
) -> Array:
    def run(query: Array, key: Array, value: Array) -> Array:
        at, keys_at = pattern.query_positions, pattern.key_positions
        where = {"query_positions": at, "key_positions": keys_at}
        return attention(query, key, value, pattern.mask, daa=daa, scale=scale, **where)

    if pattern.front is None:
        return run(query, key, value)
    size, (batch, length) = pattern.mask.shape[-1], query.shape[:2]
    attended = run(*(_to_groups(x, size, pattern.front) for x in (query, key, value)))
    groups = -(-(pattern.front + length) // size)
    rows = attended.reshape(batch, groups * size, *attended.shape[2:])
    return jax.lax.slice_in_dim(rows, pattern.front, pattern.front + length, axis=1)


def _to_groups(x: Array, size: int, front: int) -> Array:
    """[batch, seq, …] → [batch · groups, size, …], zeros in front of the first and after the last token."""
    back = -(front + x.shape[1]) % size
    padded = jnp.pad(x, [(0, 0), (front, back)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(-1, size, *x.shape[2:])
