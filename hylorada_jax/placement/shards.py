"""What a program knows of the mesh in use, and the arrays that it is given."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hylorada_jax.placement.axes import AXES, ROWS, Axis, dividing
from hylorada_jax.placement.placement import (
    RULES,
    Placement,
    Rule,
    as_spec,
    mesh_of,
    parse_mesh,
    rows_of,
    specs_of,
)


def on_devices(tree: Any, *, like: Any) -> Any:
    """A tree as it lies, where ``like`` is on a mesh; else with a copy on every other device."""
    return Placement(parse_mesh()).put(tree) if mesh_of(like) is None else tree


def in_use(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs know of the mesh that a tree lies on, if it lies on several devices.

    In a function that is being traced, as by a user's ``jax.jit``, it changes nothing.
    """
    mesh = mesh_of(tree)
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    try:
        return jax.set_mesh(mesh)
    except ValueError:  # jax refuses it within a trace
        return contextlib.nullcontext()


def over_rows(mesh: Mesh) -> NamedSharding:
    """How a batch lies on a mesh, which may be a user's own without one of the axes.

    Example:
        >>> tuple(over_rows(jax.make_mesh((1,), ("fsdp",))).spec)
        ('fsdp',)
    """
    return NamedSharding(mesh, as_spec([tuple(axis for axis in ROWS if axis in mesh.axis_names)]))


def own_rows(mesh: Mesh | None, rows: int) -> list[int]:
    """Those of the rows of a batch that this process's devices compute; of one process, all.

    Example:
        >>> own_rows(parse_mesh(), 4)
        [0, 1, 2, 3]
    """
    if mesh is None:
        return [*range(rows)]
    places = over_rows(mesh).addressable_devices_indices_map((rows,))
    return sorted({row for index in places.values() if index for row in range(rows)[index[0]]})


def shard_rows(batch: Any) -> Any:
    """A batch with its rows divided over the mesh in use, which must divide their number.

    Args:
        batch: arrays of the rows that :func:`own_rows` gives of it.
    """
    if not _sizes():
        return jax.device_put(batch)
    place = over_rows(jax.sharding.get_mesh())
    if place.is_fully_addressable:
        return jax.device_put(batch, place)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)


def row_groups(rows: int) -> int:
    """Into how many groups the rows of a batch fall, none of which is divided over devices.

    Example:
        >>> row_groups(8)
        1
    """
    return math.gcd(rows, rows_of(_sizes()))


def place_in_use(shape: Sequence[int], *axes: Axis) -> NamedSharding | None:
    """Where to make an array whose first axes are cut over the mesh in use; None: there is no mesh."""
    return NamedSharding(jax.sharding.get_mesh(), _spec(shape, axes)) if _sizes() else None


def cut(x: Array, *axes: Axis) -> Array:
    """An array whose first axes the compiler shall cut over those of the mesh in use, and no others."""
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes)) if _sizes() else x


def cut_by(rules: Sequence[Rule], tree: Any) -> Any:
    """A tree whose leaves the compiler shall cut over the mesh in use as rules say."""
    if not (sizes := _sizes()):
        return tree
    return jax.lax.with_sharding_constraint(tree, specs_of(tree, rules, sizes))


def on_shards(run: Callable[[Array], Array], leaf: Array, *path: str) -> Array:
    """What a function of the leaf's shape gives for each device's own part of it, which stays where it is.

    For operations that the compiler cannot divide, and would gather the leaf for.

    Args:
        run: gives an array of the shape of its argument.
        leaf: lies over the mesh in use as the usual rules say.
        path: of the leaf.
    """
    if not (sizes := _sizes()):
        return run(leaf)
    (spec,) = specs_of({"/".join(path): leaf}, RULES, sizes).values()
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)(leaf)


def on_rows(run: Callable[..., Array], x: Array, shared: Any, *others: Array) -> Array:
    """What a function gives for each device's own part of x's first axis, which are rows of a batch.

    For operations that the compiler cannot divide over rows. What it gives has that axis too.

    Args:
        run: (x, shared, *others) → array.
        x: an array over rows.
        shared: what all rows have; gathered, but for what is cut over tensor.
        others: more arrays over rows.
    """
    if not (sizes := _sizes()):
        return run(x, shared, *others)
    own, axes = _spec(x.shape[:1], (ROWS,)), {*ROWS} & {*sizes}
    specs = own, PartitionSpec(), *(own for _ in others)
    return jax.shard_map(run, in_specs=specs, out_specs=own, axis_names=axes, check_vma=False)(
        x, shared, *others
    )


def _spec(shape: Sequence[int], axes: tuple[Axis, ...]) -> PartitionSpec:
    """As far as the axes of the mesh in use divide those of the array."""
    return as_spec(dividing((*axes, *(None,) * (len(shape) - len(axes))), tuple(shape), _sizes()))


def _sizes() -> dict[str, int]:
    """Of the mesh in use; none where it is one device, a user's own mesh, or within a shard."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and mesh.size > 1 and set(mesh.axis_names) <= set(AXES)
    return dict(mesh.shape) if ours and not mesh.are_all_axes_manual else {}
