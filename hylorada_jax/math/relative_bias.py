"""The learned attention bias of every distance between two tokens (method.md §§2–3).

A gather suits CPUs and GPUs. A TPU does not fuse it into attention's own loops, as it does a chain of
selects: compiled for a v5e, a training step with the gather moves several times the memory.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Integer

from hylorada_jax.math.explicit import looked_up
from hylorada_jax.math.position import MAX_DISTANCE, NUM_BUCKETS, offset_buckets, relative_buckets

Bias = Callable[[Array, Array, Array], Array]


def relative_bias(
    position_bias: Float[Array, "buckets heads"],
    query_positions: Integer[Array, "batch query"],
    key_positions: Integer[Array, "batch key"],
) -> Float[Array, "batch heads query key"]:
    """The attention bias of every query, key and head, from the layer's small table.

        bias[h, q, k] = position_bias[bucket(q − k), h]

    Args:
        position_bias: one learned number per bucket and head, zeros at the start.
        query_positions: position ids of the queries.
        key_positions: position ids of the keys.

    Returns:
        The bias, in position_bias's dtype. Nothing of its size is kept for the backward pass.

    Example:
        >>> table = jnp.zeros((64, 1)).at[0].set(1.0)
        >>> relative_bias(table, jnp.array([[0, 1]]), jnp.array([[0, 1]]))[0, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Source: method.md §§2–3; Raffel et al. 2020, §2.1.
    """
    places = (positions.astype(jnp.int32) for positions in (query_positions, key_positions))
    return _relative_bias(position_bias, *places)


def gathered(table: Array, query_positions: Array, key_positions: Array) -> Array:
    """:func:`relative_bias` by looking every bucket up."""
    offset = query_positions[:, :, None] - key_positions[:, None, :]
    buckets = offset_buckets(relative_buckets(), offset)
    return jnp.moveaxis(looked_up(table, buckets), -1, 1)


def selected(table: Array, query_positions: Array, key_positions: Array) -> Array:
    """:func:`relative_bias` by going through the buckets from near to far."""
    offset = (query_positions[:, :, None] - key_positions[:, None, :])[:, None]
    distance, is_ahead = jnp.abs(offset), offset < 0
    half = NUM_BUCKETS // 2

    def bucket(number: int) -> Array:
        row = table[:, None, :, None, None]  # [buckets, 1, heads, 1, 1]
        return jnp.where(is_ahead, row[half + number], row[number])

    bias = bucket(0)
    for number, start in enumerate(_starts(), start=1):
        bias = jnp.where(distance >= start, bucket(number), bias)
    return bias


def bias_of_offsets(
    position_bias: Float[Array, "buckets heads"], offsets: Int[Array, " offsets"]
) -> Float[Array, "heads offsets"]:
    """:func:`relative_bias` of offsets q − k, one of each.

    Args:
        position_bias: see :func:`relative_bias`.
        offsets: q − k.

    Example:
        >>> table = jnp.arange(64.0)[:, None]
        >>> bias_of_offsets(table, jnp.array([-1, 0, 20])).tolist()
        [[33.0, 0.0, 16.0]]
    """
    return relative_bias(position_bias, offsets[None], jnp.zeros((1, 1), jnp.int32))[0, :, :, 0]


def band(line: Float[Array, "heads twice_block"]) -> Float[Array, "heads block block"]:
    """The bias of a block whose tokens stand side by side: what lies on one diagonal is one number.

        band[h, q, k] = line[h, block − 1 + k − q]

    Rows of the line, one longer than the rows they are cut into, lie one further to the right each time. So
    it takes no lookup, and its gradient is a sum of columns.

    Args:
        line: the bias of k − q from 1 − block on; the last one is not read.

    Example:
        >>> band(jnp.array([[1.0, 2.0, 3.0, 4.0]])).tolist()
        [[[2.0, 3.0], [1.0, 2.0]]]
    """
    heads, twice = line.shape
    block = twice // 2
    rows = jnp.broadcast_to(line[:, None], (heads, block, twice)).reshape(heads, -1)
    return rows[:, :-block].reshape(heads, block, twice - 1)[:, :, block - 1 :]


def offset_rank(offset: Int[Array, "*any"]) -> Int[Array, "*any"]:
    """How many steps of the bias lie at or below an offset q − k.

    Along the line of offsets, from far ahead to far behind, the bias is a row of the table from one step to
    the next.

    Example:
        >>> offset_rank(jnp.array([-(10**6), -1, 0, 15, 16, 10**6])).tolist()
        [0, 30, 31, 46, 47, 62]
    """
    return (offset[..., None] >= jnp.asarray(_line()[1])).sum(axis=-1, dtype=jnp.int32)


# The most ranks that few_buckets goes through.
FEW = 4


def few_buckets(
    position_bias: Float[Array, "buckets heads"],
    query_positions: Int[Array, "batch query"],
    key_positions: Int[Array, "batch key"],
    rank: Int[Array, ""],
) -> Float[Array, "batch heads query key"]:
    """:func:`relative_bias` of tokens far from each other, whose offsets have FEW ranks at most.

    Args:
        position_bias: see :func:`relative_bias`.
        query_positions: position ids of the queries.
        key_positions: position ids of the keys.
        rank: :func:`offset_rank` of the smallest offset.

    Example:
        >>> table, far = jnp.arange(64.0)[:, None], jnp.array([[100]])
        >>> few_buckets(table, far, jnp.array([[0, 60]]), offset_rank(jnp.array(40)))[0, 0].tolist()
        [[19.0, 17.0]]
    """
    order, starts = _line()
    steps = jnp.asarray([*starts, *[MAX_DISTANCE] * FEW])
    rows = position_bias[jnp.asarray([*order, *order[-1:] * FEW])]
    rows = jax.lax.dynamic_slice_in_dim(rows, rank, FEW)[:, None, :, None, None]
    distance = (query_positions[:, :, None] - key_positions[:, None, :])[:, None]
    bias = rows[0]
    for number in range(1, FEW):
        bias = jnp.where(distance >= steps[rank + number - 1], rows[number], bias)
    return jnp.broadcast_to(bias, (len(distance), position_bias.shape[1], *distance.shape[2:]))


def all_buckets(
    position_bias: Float[Array, "buckets heads"],
    query_positions: Int[Array, "batch query"],
    key_positions: Int[Array, "batch key"],
) -> Float[Array, "batch heads query key"]:
    """:func:`relative_bias` as a product with ones and zeros, and so is its gradient.

    For blocks of a row: it takes 63 numbers for every query and key. Matrix units are quick at it where
    lookups, chains of selects, and above all their derivatives are slow.

    Args:
        position_bias: see :func:`relative_bias`.
        query_positions: position ids of the queries.
        key_positions: position ids of the keys.
    """
    order, starts = _line()
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    reached = distance >= jnp.asarray(starts)[:, None, None, None]
    is_first, is_last = jnp.ones_like(reached[:1]), jnp.zeros_like(reached[:1])
    inside = jnp.concatenate([is_first, reached]) & ~jnp.concatenate([reached, is_last])
    rows = position_bias[jnp.asarray(order)]
    # The numbers are the table's own, and the sums of its gradient as exact as float32 is.
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("nh,nbqk->bhqk", rows, inside.astype(rows.dtype), precision=highest)


@functools.cache
def _line() -> tuple[list[int], list[int]]:
    """The buckets of all offsets, from far ahead to far behind, and the first offset of all but the first."""
    starts, half = _starts(), NUM_BUCKETS // 2
    ahead = [half + number for number in range(half - 1, 0, -1)]
    return ahead + list(range(half)), [1 - start for start in reversed(starts)] + starts


@functools.cache
def _starts() -> list[int]:
    """The smallest distance of every bucket but the first."""
    ahead = relative_buckets()[MAX_DISTANCE - 1 :]
    return [int(np.argmax(ahead >= number)) for number in range(1, NUM_BUCKETS // 2)]


# Its own derivative, for two reasons. The buckets are computed again in the backward pass: kept, they would
# take [query, key] memory in every layer. And each platform differentiates its own formula: through a choice
# by platform jax would keep what any of the two needs.
@jax.custom_vjp
def _relative_bias(table: Array, *positions: Array) -> Array:
    return jax.lax.platform_dependent(table, *positions, tpu=selected, default=gathered)


def _forward(table: Array, *positions: Array) -> tuple[Array, tuple[Array, ...]]:
    return _relative_bias(table, *positions), (table, *positions)


def _backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, None, None]:
    def pull(formula: Bias, g: Array, table: Array, *positions: Array) -> Array:
        return jax.vjp(lambda table: formula(table, *positions), table)[1](g)[0]

    tpu, default = (functools.partial(pull, formula) for formula in (selected, gathered))
    return jax.lax.platform_dependent(g, *residuals, tpu=tpu, default=default), None, None


_relative_bias.defvjp(_forward, _backward)
