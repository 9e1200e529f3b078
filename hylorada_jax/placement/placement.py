"""Where each leaf of a model, of its adapters and of an optimizer's state lies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hylorada_jax.errors import ConfigError
from hylorada_jax.leaves import LEAVES
from hylorada_jax.placement.axes import AXES, FSDP, ROWS, TENSOR, Axis, dividing, mesh_sizes
from hylorada_jax.trees import is_quantized

AUTO = (AxisType.Auto,) * len(AXES)
"""Of what type the axes of our meshes are; jax's default depends on its version."""

Rule = tuple[str, tuple[Axis, ...]]
"""A regular expression for the end of a leaf's path, and what the leaf's last axes are cut over.

What stacked layers have in front, their depth, is so never cut.
"""

_ADAPTERS: tuple[Rule, ...] = tuple(
    (rf"{leaf.name}|{leaf.resolved}", (FSDP, None) if leaf.cut == 0 else (None, FSDP))
    for leaf in LEAVES
    if leaf.cut is not None
)

# The first that matches decides; a leaf that none matches (norms, biases, gates …) is whole on each device.
# A kernel is Wᵀ, [in, out], perhaps of all experts, which no axis divides, and a table [vocabulary, width].
RULES: tuple[Rule, ...] = (
    (r"((q|k|v|qkv|gate|up|gate_up)_proj|w1|w3)/kernel|experts/gate_up_proj", (FSDP, TENSOR)),
    (r"((o|down)_proj|w2)/kernel|experts/down_proj", (TENSOR, FSDP)),
    (r"kernel", (FSDP, None)),  # routers, and most of Hugging Face's Flax models
    (r"embedding", (TENSOR, FSDP)),  # the head's too
    *_ADAPTERS,
)
_WHOLE_HEADS: Rule = (r"(k|v|qkv)_proj/kernel", (FSDP, None))
_UNKNOWN_HEADS: Rule = (r"(q|k|v|qkv)_proj/kernel", (FSDP, None))


def parse_mesh(text: str = "") -> Mesh:
    """The mesh of all devices that a text describes.

        data · fsdp · tensor = devices

    Args:
        text: sizes of its axes, such as "fsdp=8,tensor=2"; what they leave of the devices goes to data.

    Raises:
        ConfigError: an axis is unknown, the sizes do not multiply to the devices, or several processes would
            share some of a batch's rows and not all of theirs.

    Example:
        >>> dict(parse_mesh("fsdp=1").shape)["fsdp"]
        1
    """
    sizes = mesh_sizes(text, jax.device_count())
    mesh = jax.make_mesh([sizes[axis] for axis in AXES], AXES, axis_types=AUTO)
    rows = mesh.devices.reshape(rows_of(sizes), -1)
    check_processes([[device.process_index for device in row] for row in rows])
    return mesh


def check_processes(rows: Sequence[Sequence[int]]) -> None:
    """Refuses a mesh over which jax cannot put together the rows that several processes bring.

    Args:
        rows: for each part of a batch's rows, the processes whose devices compute it.

    Raises:
        ConfigError: they have not all as many parts, or two of them have one part in common and not all.

    Example:
        >>> check_processes([[0, 0], [1, 1]])
        >>> check_processes([[0, 1], [0, 1]])
    """
    processes = {process for row in rows for process in row}
    parts = {frozenset(n for n, row in enumerate(rows) if process in row) for process in processes}
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) > len(rows):
        raise ConfigError(
            "The processes must have as many parts of a batch's rows each, and share all of theirs or none.",
            "; ".join(f"part {n}: processes {sorted({*row})}" for n, row in enumerate(rows)),
            "Choose a tensor that divides the devices of each process, or is a multiple of them, and as many "
            "devices in each.",
        )


@dataclass(frozen=True)
class Placement:
    """A mesh, and the rules by which leaves are cut over it.

    Args:
        mesh: from :func:`parse_mesh`, with axes that are ``AxisType.Auto``. Rows of a batch are divided over
            data and fsdp.
        rules: the first that matches a leaf decides; an axis that does not divide stays whole.

    Raises:
        ConfigError: a rule is malformed, or an axis is explicit, as jax.make_mesh makes them.

    Example:
        >>> str(Placement(parse_mesh("fsdp=1,tensor=1,data=1")))  # of one device
        'data=1,fsdp=1,tensor=1'
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = RULES

    def __post_init__(self) -> None:
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if other := [axis for axis in AXES if kinds.get(axis, AxisType.Auto) is not AxisType.Auto]:
            raise ConfigError(
                "The axes of a mesh that a model is placed on are AxisType.Auto.",
                ", ".join(f"{axis} of AxisType.{kinds[axis].name}" for axis in other),
                "Make it by parse_mesh, or give jax.make_mesh axis_types=(AxisType.Auto, …).",
            )
        for rule in self.rules:
            if not _is_rule(rule):
                raise ConfigError(
                    "A rule must be a regular expression and what a leaf's last axes are cut over, two at "
                    f"most: {', '.join(AXES)}, each at most once, or None.",
                    repr(rule),
                    'Write it as ("(q|k|v)_proj/kernel", ("fsdp", "tensor")); stacked layers are never cut.',
                )

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of a tree: parameters, adapters, or an optimizer's state of them."""
        specs = specs_of(tree, self.rules, self.mesh.shape)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def shapes(self, tree: Any) -> Any:
        """The shapes of a tree's leaves where they belong: arguments to compile a program for."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
            self.shardings(tree),
        )

    def put(self, tree: Any) -> Any:
        """A tree with every leaf on its devices; leaves already there are not copied.

        In several processes each gives its own devices their parts: a leaf that lies with one process must be
        the same in all.
        """
        return jax.tree.map(_put, tree, self.shardings(tree))

    def undivided(self, tree: Any) -> list[str]:
        """The leaves that are cut less than their rule says, as lines to print.

        An axis of theirs does not divide, or it would divide within a head (:meth:`for_heads`). A line has a
        leaf's path, its shape, and the axes of the mesh that do not cut it. Of a quantised kernel its codes
        count, not its scales.
        """
        found = []
        meant_rules = [rule for rule in self.rules if rule != _WHOLE_HEADS]
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]:
            path, shape, sizes = _path(keys), tuple(getattr(leaf, "qvalue", leaf).shape), self.mesh.shape
            everywhere = (0,) * len(shape)  # which every size divides
            meant = dividing(_axes_of(path, len(shape), meant_rules), everywhere, sizes)
            cut = dividing(_axes_of(path, len(shape), self.rules), shape, sizes)
            if missing := [name for axis in meant for name in axis if name not in sum(cut, ())]:
                found.append(f"{path} {shape}, not over {', '.join(missing)}")
        return found

    @property
    def rows(self) -> int:
        """The number of parts a batch's rows are divided into."""
        return rows_of(self.mesh.shape)

    def for_heads(self, heads: int, kv_heads: int) -> Placement:
        """The placement for layers of so many heads, none of which is cut.

        Args:
            heads: query heads.
            kv_heads: key and value heads; where tensor does not divide them, their weights stay whole.

        Raises:
            ConfigError: tensor does not divide the query heads.
        """
        tensor = self.mesh.shape.get(TENSOR, 1)
        if heads % tensor:
            raise ConfigError(
                "The mesh's axis tensor must divide the model's attention heads.",
                f"tensor={tensor}, {heads} heads",
                "Choose another size of tensor, and give the rest to fsdp.",
            )
        if kv_heads % tensor == 0 or _WHOLE_HEADS in self.rules:
            return self
        return replace(self, rules=(_WHOLE_HEADS, *self.rules))

    def for_unknown_heads(self) -> Placement:
        """The placement for layers of nobody knows how many heads, of which none is cut."""
        return self if _UNKNOWN_HEADS in self.rules else replace(self, rules=(_UNKNOWN_HEADS, *self.rules))

    def check_rows(self, batch_size: int, microbatches: int) -> None:
        """Refuses batches whose rows cannot be divided; a ConfigError."""
        if batch_size // microbatches % self.rows:
            fewer = ", fewer microbatches" if microbatches > 1 and batch_size % self.rows == 0 else ""
            raise ConfigError(
                "The mesh's data × fsdp, over which rows are divided, must divide batch_size / microbatches.",
                f"{batch_size} / {microbatches} = {batch_size // microbatches} rows, {self}",
                f"Choose a batch_size that is a multiple of {self.rows * microbatches}{fewer} or a larger "
                "tensor.",
            )

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())


def _put(leaf: Any, place: NamedSharding) -> jax.Array:
    if place.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, place)
    host = np.asarray(leaf)  # not device_put, which gathers it from all processes to compare
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def placement_of(tree: Any) -> Placement | None:
    """The placement of a tree that lies on a mesh, by the usual rules; None of one that does not."""
    mesh = mesh_of(tree)
    return None if mesh is None else Placement(mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree's leaves lie on; None where they are on one device, or no arrays."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def rows_of(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of such sizes divides rows."""
    return math.prod(sizes.get(axis, 1) for axis in ROWS)


def specs_of(tree: Any, rules: Sequence[Rule], sizes: Mapping[str, int]) -> Any:
    """The ``PartitionSpec`` of every leaf of a tree, on a mesh of such sizes."""

    def spec(keys: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        return as_spec(dividing(_axes_of(_path(keys), len(leaf.shape), rules), leaf.shape, sizes))

    return jax.tree_util.tree_map_with_path(spec, tree)


def as_spec(cuts: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """What :func:`dividing` found, as jax writes it."""
    parts = [names[0] if len(names) == 1 else names or None for names in cuts]
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def _is_rule(rule: Any) -> bool:
    try:
        pattern, axes = rule
        re.compile(pattern)
        named = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis or ())]
    except (TypeError, ValueError, re.error):
        return False
    return isinstance(axes, tuple) and len(axes) <= 2 and len({*named} & {*AXES}) == len(named)


def _axes_of(path: str, ndim: int, rules: Sequence[Rule]) -> tuple[Axis, ...]:
    for pattern, axes in rules:
        if len(axes) <= ndim and re.search(rf"(^|/)({pattern})$", path):
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def _path(keys: tuple[Any, ...]) -> str:
    """A leaf's path in the tree of dictionaries that it is in: an optimizer's state has such trees within."""
    names: list[str] = []
    within = False
    for key in keys:
        if isinstance(key, jax.tree_util.DictKey):
            names, within = [*names, str(key.key)] if within else [str(key.key)], True
        else:
            within = False
    return "/".join(names)
