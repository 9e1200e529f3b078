"""From tensors on disk to a parameter tree: one tensor at a time, and a report of all that does not fit."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from hylorada_jax.errors import ModelError
from hylorada_jax.io.safetensors_header import read_header
from hylorada_jax.models.text_part import text_name
from hylorada_jax.placement.placement import Placement
from hylorada_jax.text import short
from hylorada_jax.trees import TreePath

_MAX_AXES = 8
_RULE = "A safetensors file must be complete and well formed."
_REMEDY = "The file is truncated or damaged: download it again."
_FLOATS = ("F64", "F32", "F16", "BF16")

_T = TypeVar("_T")
Part = tuple[slice, ...]
"""A slice along each axis of a tensor; an empty one is all of it."""
# Constants that old checkpoints carry as tensors, and transformers computes: masks, positions, frequencies.
CONSTANTS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.position_ids$|\.inv_freq$")


class Weights(Protocol):
    """Named tensors on disk, each read on request, in PyTorch's orientation."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The dtype that every tensor is read in, as safetensors writes it."""

    def read(self, name: str, part: Part = ()) -> np.ndarray:
        """One tensor, or a part of it, as a new array."""

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""


class SafetensorsWeights:
    """The tensors of one or more safetensors files.

    Args:
        files: the file, or all shards.
        inside: they are a multimodal model's, and its text part is wanted, under the names of one of text.

    Raises:
        ModelError: a file is truncated or damaged, its header is too large, a name occurs twice, or a tensor
            has no values.
    """

    def __init__(self, files: Sequence[Path], *, inside: bool = False) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._names: dict[str, str] = {}
        for file in files:
            for theirs, (dtype, shape) in _header(file).items():
                name = text_name(theirs) if inside else theirs
                if name is None:
                    continue
                if name in self._files:
                    raise ModelError(
                        "A tensor must be in one shard only.",
                        f"{name} in {self._files[name]} and {file}",
                        "Remove the files that are left over from another download.",
                    )
                self._files[name], self._names[name] = file, theirs
                self.shapes[name], self.dtypes[name] = shape, dtype
                if 0 in shape or len(shape) > _MAX_AXES:
                    raise ModelError(
                        f"A tensor must have values, and at most {_MAX_AXES} axes.",
                        f"{name} of shape {shape[:_MAX_AXES]} in {file}",
                        "The file is damaged, or not of a model: download it again.",
                    )

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def read(self, name: str, part: Part = ()) -> np.ndarray:
        """One tensor, or the bytes of a part of it alone, in the dtype of the file."""
        if self.dtypes[name] not in _FLOATS:
            raise ModelError(
                f"Weights must be one of {', '.join(_FLOATS)}; quantised ones cannot be adapted here.",
                f"{name} is {self.dtypes[name]} in {self._files[name]}",
                "Load the model's unquantised version.",
            )
        return self.stored(name, part)

    def stored(self, name: str, part: Part = ()) -> np.ndarray:
        """What a file has under a name, be it numbers or codes, or a part of it."""
        theirs = self._names[name]
        # Opened anew for each tensor: closing gives the mapped pages back, so that they never add up.
        with _open(self._files[name]) as tensors:
            return tensors.get_slice(theirs)[part] if part else tensors.get_tensor(theirs)


def tensor_names(files: Iterable[Path]) -> Iterator[str]:
    """The names of the tensors in safetensors files, from their headers."""
    for file in files:
        yield from _header(file)


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return read_header(file, _RULE, ModelError, _REMEDY)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(_RULE, f"{file}: {error}", _REMEDY) from error


@dataclass(frozen=True)
class Slot:
    """Where a tensor belongs in the parameter tree.

    Args:
        path: the leaf.
        at: its index on the leaf's first axes, where the leaf stacks layers, or layers of experts; empty: it
            is the whole leaf.
        transpose: whether the leaf's last two axes are (in, out) and the tensor's (out, in).
    """

    path: TreePath
    at: tuple[int, ...] = ()
    transpose: bool = False

    def turned(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor as the leaf has it, or the other way round."""
        return tensor.swapaxes(-1, -2) if self.transpose else tensor

    def in_file(self, of_axes: tuple[_T, ...]) -> tuple[_T, ...]:
        """What there is for each axis of the leaf's part, in the order of the tensor's axes."""
        return (*of_axes[:-2], *of_axes[-2:][::-1]) if self.transpose else of_axes


def load_tree(
    leaves: Mapping[TreePath, tuple[int, ...]],
    slots: Mapping[str, Slot],
    weights: Weights,
    dtype: Any,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Read a parameter tree, one tensor at a time.

    At the peak, memory holds the tree and one tensor. On CPU the tree's arrays are the buffers that were read
    into, without a copy; elsewhere each leaf moves to the device as soon as it is complete. On a mesh this
    holds of every device's share of a leaf: no more of a tensor is read than that.

    Args:
        leaves: path and shape of every leaf.
        slots: tensor name to its place; together they fill every leaf exactly.
        weights: the tensors on disk, names and shapes already checked by `check_match`.
        dtype: of the tree; each tensor is cast as it is read.
        placement: where leaves go; None: to the default device.

    Returns:
        The tree as nested dictionaries of jax arrays.

    Raises:
        ModelError: a weight is NaN or infinite, or becomes infinite in `dtype`.
    """
    by_leaf: dict[TreePath, list[tuple[str, Slot]]] = {path: [] for path in leaves}
    for name, slot in slots.items():
        by_leaf[slot.path].append((name, slot))

    def read(path: TreePath, shape: tuple[int, ...], part: Part) -> np.ndarray:
        leaf = aligned(shape, dtype)
        for name, slot in by_leaf[path]:
            own, target = part[len(slot.at) :], leaf[slot.at] if slot.at else leaf
            tensor = weights.read(name, slot.in_file(own))
            with np.errstate(over="ignore"):  # an overflow is reported below, with the tensor's name
                target[...] = slot.turned(tensor)
            check_finite(target, name, weights)
        return leaf

    if placement is None:
        return unflatten_dict({path: jax.device_put(read(path, shape, ())) for path, shape in leaves.items()})
    shapes = unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in leaves.items()})
    places = flatten_dict(placement.shardings(shapes))
    return unflatten_dict(
        {path: _in_parts(shape, places[path], partial(read, path)) for path, shape in leaves.items()}
    )


def _in_parts(
    shape: tuple[int, ...],
    place: jax.sharding.NamedSharding,
    read: Callable[[tuple[int, ...], Part], np.ndarray],
) -> jax.Array:
    """An array of parts, each read once for all devices that have it, one after the other."""
    shares = []
    for part, devices in owners(shape, place):
        values = read(place.shard_shape(shape), part)
        shares += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, place, shares)


def owners(shape: tuple[int, ...], place: jax.sharding.NamedSharding) -> list[tuple[Part, list[jax.Device]]]:
    """The parts of an array of this process's devices, each once, and the devices that have it."""
    found = defaultdict(list)
    for device, index in place.addressable_devices_indices_map(shape).items():
        assert index is not None
        found[tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))].append(device)
    return [(tuple(slice(*ends) for ends in bounds), devices) for bounds, devices in found.items()]


def check_finite(values: np.ndarray, name: str, weights: Weights) -> None:
    """Refuses a tensor with a value that is no number, or became infinite in its dtype; a ModelError."""
    if not np.isfinite(values).all():
        raise ModelError(
            f"Weights must be finite in {values.dtype.name}.",
            f"{name} in {weights.file_of(name)} has NaN or infinite values",
            "The checkpoint is damaged: download it again; or load it in a wider dtype.",
        )


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that jax can use on CPU as it is: XLA wants 64 bytes of alignment, else it copies."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def check_match(
    leaves: Mapping[TreePath, tuple[int, ...]],
    slots: Mapping[str, Slot],
    weights: Weights,
    is_harmless: Callable[[str], bool],
    where: object,
) -> None:
    """Refuse weights that do not fit the model, showing both sides.

    Args:
        leaves: path and shape of every leaf of the parameter tree.
        slots: expected tensor name to its place in the tree.
        weights: the tensors on disk.
        is_harmless: whether a tensor that the model has no place for is known to carry nothing.
        where: the model's place, for the message.

    Raises:
        ModelError: a tensor is missing, has no place, or has the wrong shape.
    """
    misshapen = []
    for name, slot in slots.items():
        expected = slot.in_file(leaves[slot.path][len(slot.at) :])
        if name in weights.shapes and weights.shapes[name] != expected:
            misshapen.append(f"{name} {weights.shapes[name]} instead of {expected}")
    sides = {
        "missing": [name for name in slots if name not in weights.shapes],
        "unexpected": [name for name in weights.shapes if name not in slots],
        "wrong shape": misshapen,
    }
    # Last, and only when the rest fits, because to know it a tensor may have to be read.
    if not sides["missing"] and not misshapen:
        sides["unexpected"] = [name for name in sides["unexpected"] if not is_harmless(name)]
    if any(sides.values()):
        report = [f"{side} ({len(names)}): {short(sorted(names))}" for side, names in sides.items() if names]
        raise ModelError(
            "The weights must fit the model that the config describes, tensor by tensor.",
            f"{where}\n    " + "\n    ".join(report),
            "Check that config.json and the weights are of the same model and that the download is complete.",
        )


def check_tied(head: str, embeddings: Collection[str], weights: Weights) -> None:
    """Raises where a head that the config ties, and that the weights have all the same, differs.

    Args:
        head: its tensor.
        embeddings: the tensors one of which it must equal.
        weights: of both.
    """
    if not any(are_equal(weights, name, head) for name in embeddings):
        raise ModelError(
            "With tie_word_embeddings the output head must equal the input embedding.",
            f"{head} in {weights.file_of(head)} differs from {short(sorted(embeddings))}",
            "Set tie_word_embeddings to false in config.json if the head was trained apart.",
        )


# Numbers read at a time: their float64 copies stay at a few megabytes.
_PIECE = 1 << 19

Pieces = Iterator[np.ndarray]
"""A tensor's values, piece by piece in C order."""
Reader = Callable[[Any], np.ndarray]
"""Slices of a tensor's axes → its values there."""


def are_equal(weights: Weights, one: str, other: str) -> bool:
    """Whether two tensors have the same shape and values; of each a piece is in memory at a time."""
    pieces = zip(pieces_of(weights, one), pieces_of(weights, other), strict=True)
    return weights.shapes[one] == weights.shapes[other] and all(np.array_equal(*pair) for pair in pieces)


def pieces_of(weights: Weights, name: str) -> Pieces:
    """A tensor as the files have it."""
    shape = weights.shapes[name]
    read = reader_of(weights, name) if shape else lambda _: weights.read(name)
    return (read(part) for part in parts_of(shape))


def reader_of(weights: Weights, name: str) -> Reader:
    """Reads parts of a tensor: of a safetensors file those alone, of another the whole once."""
    if not isinstance(weights, SafetensorsWeights):
        whole = weights.read(name)
        return lambda part: whole[part]

    return lambda part: weights.read(name, part if isinstance(part, tuple) else (part,))


def parts_of(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs along the first axis of about _PIECE numbers each; of a single number, one that reads it."""
    length, width = (shape or (1,))[0], max(1, math.prod(shape[1:]))
    step = max(1, _PIECE // width)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
