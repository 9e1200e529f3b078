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
from jaxtyping import Float, Int

from hylorada_jax.math.position import MAX_DISTANCE, NUM_BUCKETS, offset_buckets, relative_buckets

Bias = Callable[[Array, Array, Array], Array]


def relative_bias(
    position_bias: Float[Array, "buckets heads"],
    query_positions: Int[Array, "batch query"],
    key_positions: Int[Array, "batch key"],
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
    return _relative_bias(position_bias, query_positions, key_positions)


def gathered(table: Array, query_positions: Array, key_positions: Array) -> Array:
    """:func:`relative_bias` by looking every bucket up."""
    offset = query_positions[:, :, None] - key_positions[:, None, :]
    buckets = offset_buckets(relative_buckets(), offset)
    return jnp.moveaxis(jnp.take(table, buckets, axis=0, mode="clip"), -1, 1)


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
