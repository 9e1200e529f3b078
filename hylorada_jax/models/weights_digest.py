"""A digest of a base model's weights, which tells whether two models compute with the same numbers.

It is of every bit, and not of a sample: an edited row of an embedding is as much another model as another
checkpoint. That costs what SHA-256 does, about a second for 2 GB and core; leaves are read in parallel. Of
several processes each hashes what lies whole with it, so that copies which differ are found, and its share of
what several hold between them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, zip_longest
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from hylorada_jax.math.quantized import split_name
from hylorada_jax.models.loading import weights_layout
from hylorada_jax.models.quantize import is_kept_in_codes, quantized_shapes, read_quantized
from hylorada_jax.models.source import Source
from hylorada_jax.placement.processes import everywhere, lies_here, replicated
from hylorada_jax.trees import is_quantized

_PIECE_BYTES = 1 << 26


def tree_digest(params: Mapping[str, Any]) -> str:
    """The digest of a parameter tree: of each leaf's path, shape, dtype and bytes.

    Args:
        params: nested dictionaries of arrays, on any device; of a quantised kernel codes and scales count.

    Returns:
        A SHA-256, as hexadecimal digits.

    Example:
        >>> zeros, ones = ({"fc": {"kernel": array((2, 3))}} for array in (jax.numpy.zeros, jax.numpy.ones))
        >>> tree_digest(zeros) == tree_digest(zeros), tree_digest(zeros) == tree_digest(ones)
        (True, False)
    """
    return _of_all(_of_leaves(params))


def files_digest(source: Source, dtype: str) -> str:
    """The digest of the tree that `load_model` makes of a model's files, without making it.

    Memory holds one tensor at a time, or all layers' quantised kernels of one name.

    Args:
        source: the model, with its weights.
        dtype: of the tree, as :func:`dtype_name` gives it.

    Returns:
        What :func:`tree_digest` gives of the loaded model.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
    """
    leaves, slots, weights = weights_layout(source)
    kept, base_dtype = split_name(dtype)
    digests: dict[str, str] = {}
    for path, shape in leaves.items():
        parts = sorted((slot.at, name) for name, slot in slots.items() if slot.path == path)
        if base_dtype and is_kept_in_codes(path, base_dtype):
            codes = quantized_shapes(path, jax.ShapeDtypeStruct(shape, kept), base_dtype)
            own = [(name, slots[name]) for _, name in parts]
            digests |= _of_leaves(unflatten_dict({path: read_quantized(codes, own, weights)}))
            continue
        turned = (slots[name].turned(weights.read(name)) for _, name in parts)
        digests["/".join(path)] = _of_leaf(shape, kept, (tensor.astype(kept) for tensor in turned))
    return _of_all(digests)


def _of_leaves(params: Mapping[str, Any]) -> dict[str, str]:
    split = jax.tree.map(
        lambda leaf: {"qvalue": leaf.qvalue, "scale": leaf.scale} if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )
    leaves = flatten_dict(split, sep="/")
    shared = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Array) and not lies_here(leaf)}
    own = {path: _of_this_process(leaf) for path, leaf in leaves.items() if path not in shared}
    with ThreadPoolExecutor() as pool:  # SHA-256 lets other threads run beside it
        digests = pool.map(lambda leaf: _of_leaf(leaf.shape, leaf.dtype, _pieces(leaf)), own.values())
        return dict(zip(own, digests, strict=True)) | _of_shared(shared)


def _of_this_process(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """A leaf that other processes need not help to read; programs of several are started in one order."""
    return leaf if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable else leaf.addressable_data(0)


def _of_shared(leaves: Mapping[str, Array]) -> dict[str, str]:
    """Of leaves that several processes hold between them, each of which hashes some; all must call it.

    As many leaves are gathered side by side as processes hold a copy, one for each of these.
    """
    if not leaves:
        return {}
    me, mine = jax.process_index(), dict[str, str]()
    copies = {path: copies_of(_parts(leaf)) for path, leaf in leaves.items()}
    # Side by side leaves of about one size, so that no process waits long for another.
    paths = sorted(leaves, key=lambda path: (copies[path], -leaves[path].nbytes, path))
    for alike, group in groupby(paths, key=lambda path: copies[path]):
        those, count = [*group], len(alike[0])
        place = next(copy.index(me) for copy in alike if me in copy)
        for start in range(0, len(those), count):
            together = those[start : start + count]
            at = place % len(together)  # where they are fewer, some hash the same
            leaf = leaves[together[at]]
            gathered = _gathered([leaves[path] for path in together], at)
            mine[together[at]] = _of_leaf(leaf.shape, leaf.dtype, gathered)
    found = everywhere(mine)
    # From those that have this process's copy, which another may differ from.
    with_me = {path: next(copy for copy in alike if me in copy) for path, alike in copies.items()}
    return {path: next(found[n][path] for n in with_me[path] if path in found[n]) for path in leaves}


def copies_of(parts: Sequence[frozenset[str]]) -> tuple[tuple[int, ...], ...]:
    """For each copy of an array, the processes that hold it between them.

    Args:
        parts: of each process, those of the array's parts that it has.

    Example:
        >>> copies_of([frozenset("ab"), frozenset("cd"), frozenset("ab"), frozenset("cd")])
        ((0, 1), (2, 3))
    """
    holders: dict[frozenset[str], list[int]] = defaultdict(list)
    for process, held in enumerate(parts):
        holders[held].append(process)
    count = max(map(len, holders.values()))
    return tuple(tuple(those[n % len(those)] for those in holders.values()) for n in range(count))


def _parts(leaf: Array) -> list[frozenset[str]]:
    held = [set[str]() for _ in range(jax.process_count())]
    places: Mapping[Any, Any] = leaf.sharding.devices_indices_map(leaf.shape)
    for device, index in places.items():
        held[device.process_index].add(str(index))
    return [frozenset(parts) for parts in held]


def _of_leaf(shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray]) -> str:
    sha = hashlib.sha256(f"{tuple(shape)} {np.dtype(dtype).name}".encode())
    for piece in pieces:
        # Through bytes, for bfloat16 has no buffer protocol.
        sha.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _of_all(digests: Mapping[str, str]) -> str:
    lines = (f"{path} {sha}" for path, sha in sorted(digests.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _pieces(leaf: Array | np.ndarray) -> Iterator[np.ndarray]:
    """A leaf in runs along its first axis; on CPU as it lies there."""
    if _lies_on_host(leaf) or not leaf.ndim:
        yield np.asarray(leaf)
        return
    # In pieces, for an array keeps the host's copy of itself that was once asked for.
    for run in _runs(leaf):
        yield np.asarray(jax.lax.dynamic_slice_in_dim(leaf, *run))


def _gathered(leaves: Sequence[Array], mine: int) -> Iterator[np.ndarray]:
    """The pieces of one of several leaves, all of which all processes gather side by side."""
    for turn in zip_longest(*map(_runs, leaves)):
        own = None
        for at, (leaf, run) in enumerate(zip(leaves, turn, strict=True)):
            if run is None:
                continue
            piece = replicated(jax.lax.dynamic_slice_in_dim(leaf, *run))
            if at == mine:
                own = np.asarray(piece)
            else:
                piece.block_until_ready()  # before the next, so that a device holds one at a time
        if own is not None:  # here, where the others hash theirs
            yield own


def _runs(leaf: Array | np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs along a leaf's first axis: where each begins, and its length."""
    length = len(leaf)
    step = max(1, min(length, _PIECE_BYTES * length // max(1, leaf.nbytes)))
    return ((start, min(step, length - start)) for start in range(0, length, step))


def _lies_on_host(leaf: Array | np.ndarray) -> bool:
    return isinstance(leaf, np.ndarray) or (
        leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())
    )
