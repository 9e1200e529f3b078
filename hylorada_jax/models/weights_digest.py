"""A digest of a base model's weights, which tells whether two models compute with the same numbers.

It is of every bit, and not of a sample: an edited row of an embedding is as much another model as another
checkpoint. That costs what SHA-256 does, about a second for 2 GB and core; leaves are read in parallel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from hylorada_jax.math.quantized import split_name
from hylorada_jax.models.loading import weights_layout
from hylorada_jax.models.quantize import is_kept_in_codes, quantized_shapes, read_quantized
from hylorada_jax.models.source import Source
from hylorada_jax.placement.processes import whole
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
    # SHA-256 lets other threads run beside it; but processes must gather the leaves in one order.
    with ThreadPoolExecutor(None if jax.process_count() == 1 else 1) as pool:
        digests = pool.map(lambda leaf: _of_leaf(leaf.shape, leaf.dtype, _pieces(leaf)), leaves.values())
        return dict(zip(leaves, digests, strict=True))


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
    length = len(leaf)
    step = max(1, min(length, _PIECE_BYTES * length // max(1, leaf.nbytes)))
    for start in range(0, length - step + 1, step):
        yield whole(jax.lax.dynamic_slice_in_dim(leaf, start, step))
    if rest := length % step:
        yield whole(leaf[length - rest :])


def _lies_on_host(leaf: Array | np.ndarray) -> bool:
    return isinstance(leaf, np.ndarray) or (
        leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())
    )
