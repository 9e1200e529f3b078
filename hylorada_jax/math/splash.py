"""Attention by jax's splash kernel for TPUs: memory in proportion to the length, no position bias.

The kernel is jax's own (``jax.experimental.pallas.ops.tpu.splash_attention``). What is here hands it rows of
any length, and padding as a document of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.kernel_rows import block_length, in_shards, padded_rows, visible_blocks
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.remat import OUTPUT


def splash_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    pattern: Pattern,
    *,
    scale: float | Float[Array, " heads"],
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Self-attention of whole rows without an array of [query, key], compiled for TPUs.

        S = scale · q kᵀ,   softmax(soft_cap · tanh(S / soft_cap) where visible) v

    The scale is multiplied into the queries, and they are rounded to their dtype: no rounding where it is a
    power of two. Padding is a segment of its own: it sees padding, which is finite and has finite gradients,
    where the dense formula lets it see tokens; nothing reads either.

    Args:
        query: queries, float32 or bfloat16.
        key: keys of the same tokens; heads is a multiple of kv_heads. They are never repeated.
        value: values.
        pattern: of whole rows, as :meth:`Pattern.of_rows` makes it, with a window that is not traced.
        scale: of the logits, for all heads or, with α, for each.
        soft_cap: bound of the logits (Gemma 2's); None: no bound.
        sinks: a logit per query head that has no value; None: none.
        block: tokens of a block, a multiple of 128; None takes what suits the length.
        interpret: runs the kernel's program step by step, on any platform, for tests.

    Returns:
        The attended values in query's dtype.

    Raises:
        ConfigError: the window is traced.

    Source:
        Dao et al. 2022 (FlashAttention), arXiv:2205.14135; the kernel is jax's.
    """
    length = query.shape[1]
    window = pattern.window
    if not (window is None or isinstance(window, int)):
        raise ConfigError(
            "The splash kernel is compiled for one window.",
            f"window={window}",
            "Take another implementation.",
        )
    size = block_length(length) if block is None else block
    rows, segments = padded_rows(query, key, value, pattern, scale, size)
    long = rows[0].shape[2]
    kernel = long, size, pattern.causal, window, soft_cap, interpret
    blocks = visible_blocks(long, size, causal=pattern.causal, window=window).shape[1]

    def of_row(query: Array, key: Array, value: Array, own: Array | None, *sinks: Array) -> Array:
        run = _kernel(len(query), *kernel)  # of the heads that this device has
        # The kernel states no cost; planning/hlo_cost.py reads it off this name.
        with jax.named_scope(f"{blocks}_blocks_of_{size}"):
            return run(query, key, value, None if own is None else splash.SegmentIds(own, own), *sinks)

    by_head = () if sinks is None else (sinks.astype(jnp.float32),)
    axes = 0, 0, 0, None if segments is None else 0, *(None for _ in by_head)
    attended = in_shards(jax.vmap(of_row, in_axes=axes), rows, segments, by_head=by_head)
    return jnp.swapaxes(attended, 1, 2)[:, :length]


@functools.cache
def _kernel(
    heads: int,
    length: int,
    size: int,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> Callable[..., Array]:
    shape = (length, length)
    mask: splash.Mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    sizes: dict[str, Any] = {
        f"block_{name}": size
        for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    }
    with jax.core.eval_context():  # its tables of blocks are constants, also where a program is traced
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            residual_checkpoint_name=OUTPUT,
            attn_logits_soft_cap=soft_cap,
            interpret=interpret,
        )
