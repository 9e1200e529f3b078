"""Attention: positions, the mask, and the one function that every model calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
) -> Float[Array, "batch query heads head_dim"]:
    """Scaled dot-product attention with grouped heads; keys and values are never repeated.

        softmax(q kᵀ / √head_dim  where mask) v        query head h reads key-value head ⌊h·kv_heads/heads⌋

    ``jax.nn.dot_product_attention`` is the same formula, but takes its softmax in float32 even for float64
    inputs; there its mask value turns to −∞, and a row without a visible key to NaN. Here a row without a
    visible key (padding) takes the mean of the values, which is finite and has finite gradients.

    Args:
        query: queries.
        key: keys; heads is a multiple of kv_heads.
        value: values.
        mask: True where the query sees the key.

    Returns:
        The attended values in query's dtype; logits and softmax are in float32 at least.

    Source:
        Vaswani et al., arXiv:1706.03762 §3.2.1; grouped queries: Ainslie et al., arXiv:2305.13245 §2.2.

    Example:
        >>> q = jnp.ones((1, 2, 4, 8)); kv = jnp.ones((1, 2, 2, 8))
        >>> attention(q, kv, kv, causal_mask(jnp.arange(2), jnp.arange(2))).shape
        (1, 2, 4, 8)
    """
    batch, length, _, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=dtype) * head_dim**-0.5
    # A finite number, so that a row with no visible key is uniform and not 0/0.
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(query.shape)
