"""Operations of which jax must be given the sharding of the result on a mesh of explicit axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


def explicit_axes() -> bool:
    """Whether the mesh in use has explicit axes."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def looked_up(table: Array, index: Array) -> Array:
    """table[index], cut as the index is.

    Args:
        table: [rows, …].
        index: integers of any shape; beyond the table they take its nearest row.

    Returns:
        […of index, …of a row].

    Example:
        >>> looked_up(jnp.array([0.5, 1.5]), jnp.array([[1, 0, 7]])).tolist()
        [[1.5, 0.5, 1.5]]
    """
    if not explicit_axes():
        return jnp.take(table, index, axis=0, mode="clip")
    return table.at[index].get(mode="clip", out_sharding=PartitionSpec(*_cuts(index)))


def rows_folded(x: Array, *shape: int) -> Array:
    """x [rows, tokens, …] as [rows · n, tokens / n, …], or back; rows stay on their devices.

    Args:
        x: whose tokens no mesh cuts.
        shape: of the result.

    Example:
        >>> rows_folded(jnp.zeros((2, 6, 4)), 6, 2, 4).shape
        (6, 2, 4)
    """
    if not explicit_axes():
        return x.reshape(shape)
    rows, _, *rest = _cuts(x)
    return x.reshape(shape, out_sharding=PartitionSpec(rows, None, *rest))


def _cuts(x: Array) -> Any:
    return jax.typeof(x).sharding.spec
