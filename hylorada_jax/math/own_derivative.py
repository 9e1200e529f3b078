"""The call of a function with a derivative of its own, for ``jax.shard_map`` and explicit meshes too.

There a gradient must be placed as its argument is. jax's operations see to that, with a sum over the shards
where one value meets several; a ``jax.custom_vjp`` has to see to it itself. Placed alike before the call, the
arguments get their sums from the transpose of that placing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from hylorada_jax.math.explicit import explicit_axes


def called(function: Callable[..., Array], *arguments: Any, spec: PartitionSpec) -> Array:
    """function(*arguments).

    Args:
        function: a ``jax.custom_vjp``.
        arguments: trees of arrays.
        spec: how the result is sharded on a mesh with explicit axes.

    Example:
        >>> called(jax.numpy.add, jax.numpy.ones(2), jax.numpy.ones(2), spec=jax.P()).tolist()
        [2.0, 2.0]
    """
    if explicit_axes():
        return jax.sharding.auto_axes(function, out_sharding=spec)(*arguments)
    varying = frozenset().union(*map(_varying, jax.tree.leaves(arguments)))
    return function(*jax.tree.map(lambda x: _cast(x, varying), arguments))


def _varying(x: Array) -> frozenset[Any]:
    """The manual axes of a mesh over which an array varies."""
    return jax.typeof(x).manual_axis_type.varying


def _cast(x: Array, axes: frozenset[Any]) -> Array:
    missing = axes - _varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x
