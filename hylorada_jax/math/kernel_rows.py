"""Rows as TPU kernels take them: heads first, whole blocks, each device its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.scaled_sum import nonzero
from hylorada_jax.placement.axes import TENSOR

# The segment of padding, and of what fills rows up to whole blocks; documents have numbers from 0 on.
FILLING = -1


def block_length(length: int) -> int:
    """How many tokens a block has: at most 512, as many as lengthen the rows by an eighth at most.

    Example:
        >>> [block_length(length) for length in (100, 1000, 1100, 4096)]
        [128, 512, 256, 512]
    """
    least = -(-length // 128) * 128
    return next(size for size in (512, 256, 128) if -(-length // size) * size <= least * 1.125)


def visible_blocks(length: int, size: int, *, causal: bool, window: int | None) -> np.ndarray:
    """[2, pairs]: the blocks of queries, and of keys, of which some query sees some key, but for segments.

    Example:
        >>> visible_blocks(512, 128, causal=True, window=100).tolist()
        [[0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3]]
    """
    pairs = np.indices((length // size,) * 2).reshape(2, -1)
    apart = pairs[0] - pairs[1]
    seen = (apart >= 0) | (not causal)
    if window is not None:
        seen &= nearest(apart, size) < window
    return pairs[:, seen]


def nearest(apart: Any, size: int) -> Any:
    """The smallest distance of a query from a key in blocks that are so many blocks apart."""
    return (apart - 1) * size + 1


def _own_segments(pattern: Pattern) -> Int[Array, "batch seq"] | None:
    """The segments of a pattern of whole rows, where padding is a segment of its own."""
    if pattern.key_valid is None:
        return pattern.query_segments
    segments = jnp.int32(0) if pattern.query_segments is None else pattern.query_segments
    return jnp.where(pattern.key_valid, segments, FILLING)


def padded_rows(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    pattern: Pattern,
    scale: float | Float[Array, " heads"],
    size: int,
) -> tuple[tuple[Float[Array, "batch _ long head_dim"], ...], Int[Array, "batch long"] | None]:
    """Rows with heads first and queries scaled, and their segments, filled up to a multiple of ``size``.

    Args:
        query: queries.
        key: keys.
        value: values.
        pattern: of whole rows. Where tokens see later ones, what fills the rows is a segment of its own.
        scale: of the logits, for all heads or for each.
        size: tokens of a block.
    """
    segment_ids = _own_segments(pattern)
    batch, length = query.shape[:2]
    short = -length % size
    if segment_ids is None and short and not pattern.causal:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, short)), constant_values=FILLING)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    query = _scaled(query, jnp.broadcast_to(jnp.asarray(scale, jnp.float32), query.shape[1:2]))
    return tuple(jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) for x in (query, key, value)), segment_ids


@jax.custom_vjp
def _scaled(
    query: Float[Array, "batch heads seq head_dim"], scale: Float[Array, " heads"]
) -> Float[Array, "batch heads seq head_dim"]:
    """Queries times the scale of their head, whose gradient needs no more than what the kernel reads."""
    return _scaled_forward(query, scale)[0]


def _scaled_forward(query: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    scale = nonzero(scale)[:, None, None]
    product = (query * scale).astype(query.dtype)
    return product, (product, scale)


def _scaled_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    product, scale = residuals
    wide = g.astype(scale.dtype)
    return (wide * scale).astype(g.dtype), jnp.sum(wide * product, axis=(0, 2, 3)) / scale[:, 0, 0]


_scaled.defvjp(_scaled_forward, _scaled_backward)


def product(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """The product of two blocks, summed in float32 over an axis of each."""
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def tpu_kind() -> str | None:
    """The kind of TPU that is traced for, such as "TPU v5 lite": the one there is, or those of the mesh in
    use; None where there is none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        device: Any = mesh.abstract_device
        return device.device_kind if device is not None and device.platform == "tpu" else None
    alone = jax.default_backend() == "tpu" and jax.device_count() == 1
    return jax.devices()[0].device_kind if alone else None


def divided_over(rows: int) -> tuple[tuple[str, ...] | None, int] | None:
    """The axes of the mesh in use that divide so many rows, or None where they do not, and the size of
    ``tensor``; None where a kernel's arrays are on one device as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual or mesh.size == 1:
        return None
    tensor = mesh.shape.get(TENSOR, 1)
    axes = tuple(axis for axis in mesh.axis_names if axis != TENSOR)
    return (None if rows % (mesh.size // tensor) else axes), tensor


def in_shards(
    run: Callable[..., Array],
    heads: tuple[Array, ...],
    *rows: Any,
    by_head: tuple[Array | None, ...] = (),
    shared: tuple[Array, ...] = (),
) -> Array:
    """``run(*heads, *rows, *by_head, *shared)`` on every device's own rows and heads.

    The compiler cannot divide a TPU kernel by itself. The mesh is the one in use (``jax.set_mesh``); without
    one everything is on one device. Rows that the devices do not divide are computed on each of them.

    Args:
        run: a function that returns an array like the first of ``heads``.
        heads: queries, keys and values [batch, heads or kv_heads, …]. Keys and values are repeated until the
            mesh's axis tensor divides them.
        *rows: what all heads share [batch, …]; None is handed on.
        by_head: what all rows share [heads, …]; None is handed on.
        shared: what both share.
    """
    if (axes := divided_over(len(heads[0]))) is None:
        return run(*heads, *rows, *by_head, *shared)
    own_rows, tensor = axes
    own_heads = TENSOR if tensor > 1 and heads[0].shape[1] % tensor == 0 else None
    if own_heads:
        heads = tuple(jnp.repeat(x, math.lcm(x.shape[1], tensor) // x.shape[1], axis=1) for x in heads)
    own = PartitionSpec(own_rows, own_heads)
    specs = (own,) * len(heads) + (PartitionSpec(own_rows),) * len(rows)
    specs += (PartitionSpec(own_heads),) * len(by_head) + (PartitionSpec(),) * len(shared)
    divided = jax.shard_map(run, in_specs=specs, out_specs=own, check_vma=False)
    return divided(*heads, *rows, *by_head, *shared)
