"""A frozen base's kernels in int8 or nf4: those of a tree, and those of files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.math.quantized import BASE_DTYPES, HEAD, quantized
from hylorada_jax.models.families import ROUTERS
from hylorada_jax.models.mixture import EXPERTS
from hylorada_jax.models.weights import Part, Slot, Weights, aligned, check_finite, owners
from hylorada_jax.placement.axes import Axis
from hylorada_jax.placement.placement import mesh_of
from hylorada_jax.placement.shards import cut, in_use
from hylorada_jax.trees import is_quantized

if TYPE_CHECKING:
    from qwix import QArray  # type: ignore[import-untyped]


_HEAD = ("lm_head", "embedding")


def check_base_dtype(base_dtype: str | None) -> None:
    """Refuses what kernels cannot be kept in; a ConfigError."""
    if base_dtype not in (None, *BASE_DTYPES):
        raise ConfigError(
            f"base_dtype must be {', '.join(BASE_DTYPES)} or None.",
            repr(base_dtype),
            "Choose one of them.",
        )


def quantize(params: dict[str, Any], base_dtype: str) -> dict[str, Any]:
    """The parameter tree of a decoder with its linear layers' kernels in int8 or nf4.

    Embeddings, norms and biases stay as they are, and the head does unless base_dtype names it. On a mesh
    codes and scales are cut as their kernels are, as far as their sizes divide.

    Args:
        params: of :class:`CausalLM`; under ``jax.eval_shape`` shapes serve.
        base_dtype: one of :data:`hylorada_jax.math.quantized.BASE_DTYPES`.

    Raises:
        ConfigError: there is no such base_dtype, qwix is not installed, a layer's inputs do not divide, or
            the head is to be quantised and is the embedding.
        ModelError: the kernels are quantised already.

    Example:
        base = base.with_params(quantize(base.params, "nf4"))

    Source: :func:`hylorada_jax.math.quantized.quantized`.
    """
    leaves = flatten_dict(params)
    if any(map(is_quantized, leaves.values())):
        raise ModelError(
            "What is quantised is not quantised again.", base_dtype, "Load the model without base_dtype."
        )
    check_base_dtype(base_dtype)
    if base_dtype.endswith(HEAD) and _HEAD not in leaves:
        raise ConfigError(
            "A head that is the embedding is not quantised: codes beside it would take memory, not save it.",
            f"base_dtype={base_dtype!r} for a model with tie_word_embeddings",
            f"Choose base_dtype={base_dtype.removesuffix(HEAD)!r}.",
        )
    return unflatten_dict(
        {
            path: _in_codes(path, leaf, base_dtype) if is_kept_in_codes(path, base_dtype) else leaf
            for path, leaf in leaves.items()
        }
    )


def shapes_kept(shapes: dict[str, Any], base_dtype: str | None) -> dict[str, Any]:
    """The shapes of a parameter tree as a base keeps it: quantised, or with None as they are."""
    return shapes if base_dtype is None else jax.eval_shape(partial(quantize, base_dtype=base_dtype), shapes)


def quantized_shapes(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, base_dtype: str) -> QArray:
    """What :func:`quantize` makes of one leaf, stacked kernels [d_in, d_out] or the head, as shapes."""
    return jax.eval_shape(partial(_in_codes, path, base_dtype=base_dtype), leaf)


def is_kept_in_codes(path: tuple[str, ...], base_dtype: str) -> bool:
    """Whether a leaf of a decoder's tree is one that is quantised: not a router's, on which choices hang."""
    if path[-1] == "kernel":
        return ".".join(path[-3:-1]) not in ROUTERS
    if path[-2] == EXPERTS:  # all of them in one tensor
        return not path[-1].endswith("_bias")
    return path == _HEAD and base_dtype.endswith(HEAD)


def _in_codes(path: tuple[str, ...], leaf: Array, base_dtype: str) -> QArray:
    axes = () if mesh_of(leaf) is None else tuple(leaf.sharding.spec)  # type: ignore[attr-defined]
    with in_use(leaf):
        return _coded(leaf, base_dtype.removesuffix(HEAD), path == _HEAD, axes)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _coded(leaf: Array, kind: str, is_head: bool, axes: tuple[Axis, ...]) -> QArray:
    codes = _one(leaf, kind, leaf.dtype.name, out_in=True) if is_head else _stack(leaf, kind)
    # Left to itself the compiler may put all of them on every device of a mesh.
    return jax.tree.map(lambda field: cut(field, *axes), codes) if axes else codes


def _stack(kernels: Array, base_dtype: str) -> QArray:
    matrices = kernels.reshape(-1, *kernels.shape[-2:])
    codes = jax.lax.map(lambda kernel: _one(kernel, base_dtype, kernels.dtype.name), matrices)
    return jax.tree.map(lambda field: field.reshape(*kernels.shape[:-2], *field.shape[1:]), codes)


def _one(kernel: Array, base_dtype: str, dtype: str, out_in: bool = False) -> QArray:
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return quantized(wide, base_dtype, dtype, out_in=out_in)


_jitted_one = jax.jit(_one, static_argnums=(1, 2, 3))


def read_quantized(
    leaf: QArray, tensors: Iterable[tuple[str, Slot]], weights: Weights, places: QArray | None = None
) -> QArray:
    """The kernels of all layers from a model's files, each quantised as it is read.

    Memory holds the result, or this process's share of it, and one tensor. On any platform a CPU quantises:
    a TPU's division may give other codes.

    Args:
        leaf: what is wanted, as ``jax.ShapeDtypeStruct``.
        tensors: each layer's, by its name.
        weights: that has them.
        places: where codes and scales go, as ``NamedSharding``; None: to the default device.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    fields, structure = jax.tree.flatten(leaf)
    shares = [
        _Shares(field, place)
        for field, place in zip(fields, jax.tree.leaves(places) or [None] * len(fields), strict=True)
    ]
    for name, slot in tensors:
        whole = one_quantized(name, weights, leaf, slot)
        for share, codes in zip(shares, jax.tree.leaves(whole), strict=True):
            share.put(slot.at, np.asarray(codes))
    return jax.tree.unflatten(structure, [share.array() for share in shares])


def one_quantized(name: str, weights: Weights, leaf: QArray, slot: Slot) -> QArray:
    """One layer's kernel [d_in, d_out] from a model's files, as a leaf of all layers has it; or the head.

    Of a tensor of all experts, [experts, d_in, d_out], one expert is read at a time.
    """
    dtype = jnp.dtype(leaf.dtype)

    def one(part: Part) -> QArray:
        tensor = weights.read(name, part).reshape(weights.shapes[name][-2:])
        values = slot.turned(tensor).astype(np.promote_types(dtype, np.float32))
        check_finite(values, name, weights)
        with jax.default_device(_cpu()):
            return _jitted_one(values, str(leaf.qtype), dtype.name, slot.path == _HEAD)

    if len(weights.shapes[name]) == 2:
        return one(())
    each = [one((slice(expert, expert + 1),)) for expert in range(weights.shapes[name][0])]
    return jax.tree.map(lambda *parts: np.stack(parts), *each)


def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # a user's JAX_PLATFORMS leaves it out
        return None


class _Shares:
    """An array that grows layer by layer, of which each device has a part."""

    def __init__(self, field: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding | None) -> None:
        self._shape, self._place = field.shape, place
        parts = [((), [None])] if place is None else owners(field.shape, place)
        shape = field.shape if place is None else place.shard_shape(field.shape)
        self._parts = [(part, devices, aligned(shape, field.dtype)) for part, devices in parts]

    def put(self, at: tuple[int, ...], values: np.ndarray) -> None:
        for part, _, buffer in self._parts:
            buffer[at] = values[part[len(at) :]]

    def array(self) -> Array:
        shares = [jax.device_put(buffer, device) for _, devices, buffer in self._parts for device in devices]
        if self._place is None:
            return shares[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._place, shares)
