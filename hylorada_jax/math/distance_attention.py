"""Attention with HyLoRADA's position bias by kernels for TPUs: memory in proportion to the length."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from hylorada_jax.math.distance_kernels import HIDDEN, attended
from hylorada_jax.math.kernel_grid import Settings
from hylorada_jax.math.kernel_rows import block_length, in_shards, padded_rows
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.relative_bias import bias_of_offsets


def distance_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    pattern: Pattern,
    *,
    scale: float | Float[Array, " heads"],
    position_bias: Float[Array, "buckets heads_or_1"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Self-attention of whole rows with HyLoRADA's position bias, without an array of [query, key].

        S = scale · q kᵀ,   S' = soft_cap · tanh(S / soft_cap) + position_bias[bucket(q − k)]
        softmax(S' where visible) v

    The distance q − k is that of places in the row: positions must count up by one within a segment. The
    scale is multiplied into the queries, and they are rounded to their dtype: no rounding where it is a power
    of two. Padding is a segment of its own: it sees padding, which is finite and has finite gradients, where
    the dense formula lets it see tokens; nothing reads either.

    Args:
        query: queries, float32 or bfloat16.
        key: keys of the same tokens; heads is a multiple of kv_heads. They are never repeated.
        value: values.
        pattern: of whole rows, as :meth:`Pattern.of_rows` makes it.
        scale: of the logits, for all heads or, with α, for each.
        position_bias: DAA's bias per bucket of distances and head.
        soft_cap: bound of the logits (Gemma 2's); None: no bound.
        sinks: a logit per query head that has no value; None: none.
        block: tokens of a block, a multiple of 128; None takes what suits the length.
        interpret: runs the kernel's program step by step, on any platform, for tests.

    Returns:
        The attended values in query's dtype.

    Source:
        Dao et al. 2022 (FlashAttention), arXiv:2205.14135; method.md §3.
    """
    length, heads = query.shape[1:3]
    size = block_length(length) if block is None else block
    rows, segments = padded_rows(query, key, value, pattern, scale, size)
    long = rows[0].shape[2]
    causal, window = pattern.causal, pattern.window
    reach = window if isinstance(window, int) else None
    settings = Settings(size, causal, reach, soft_cap, position_bias is not None, interpret)
    distances = jnp.arange(-settings.origin(long), long, dtype=jnp.int32)
    bias = jnp.zeros((1, distances.size), jnp.float32)
    if position_bias is not None:
        bias = bias_of_offsets(position_bias.astype(jnp.float32), distances)
    limit = jnp.asarray(long if window is None else window, jnp.int32)
    visible = (distances < limit) & ((distances >= 0) | (not causal))
    bias = jnp.broadcast_to(jnp.where(visible, bias, HIDDEN), (heads, distances.size))
    run = functools.partial(attended, settings)
    by_head = (bias, None if sinks is None else sinks.astype(jnp.float32))
    out = in_shards(run, rows, segments, by_head=by_head, shared=(limit,))
    return jnp.swapaxes(out, 1, 2)[:, :length]
