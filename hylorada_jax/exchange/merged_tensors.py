"""The new values of each tensor that an adapter changes, piece by piece and rounded once."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.exchange.shards import DTYPES
from hylorada_jax.leaves import leaf_of
from hylorada_jax.math import linear_adapter, low_rank
from hylorada_jax.models.weights import Pieces, Reader, Slot, Weights, are_equal, parts_of, reader_of
from hylorada_jax.surgery.layout import tensor_name
from hylorada_jax.surgery.modules import Module
from hylorada_jax.surgery.plan import Site


def changed_tensors(
    sites: Sequence[Site],
    leaves: Mapping[str, np.ndarray],
    weights: Weights,
    slots: Mapping[str, Slot],
    config: HyLoRADAConfig,
) -> dict[str, Callable[[], Pieces]]:
    """The tensors that a merged checkpoint has anew.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        leaves: the adapter's tensors, as a file holds them.
        weights: the base model's.
        slots: which of them fills what, from :func:`hylorada_jax.models.loading.weights_layout`: files have
            names of their own, as GPT-2's on the Hub without the prefix, or BERT's norms with gamma and beta.
        config: ``magnitude_scales_bias`` is read.

    Returns:
        {name in the base model's files: a function that computes the new values, adapted ones in float64}.
    """
    changed: dict[str, Callable[[], Pieces]] = {}
    in_file = {(slot.path, slot.at): name for name, slot in slots.items()}

    def name_of(module: Module, layer: int, leaf: str) -> str | None:
        return in_file.get(((*module.path, leaf), module.index(layer)))

    for site in (site for site in sites if site.component == "unfrozen"):
        for name, layer in zip(site.names, site.layers, strict=True):
            for leaf in site.leaves:
                found = name_of(site.module, layer, leaf)
                assert found is not None, (name, leaf)  # a tensor fills every leaf
                changed[found] = partial(_in_pieces, leaves[tensor_name(name, leaf)])
    for site in (site for site in sites if site.component == "linear"):
        # A kernel comes from torch's weight by transposition: what is [d_out, d_in] here is not so there.
        turned = site.linear.kernel_is_out_in
        for name, layer, scale in zip(site.names, site.layers, site.scales, strict=True):
            own = {leaf: leaves[tensor_name(name, leaf)] for leaf in site.leaves}
            weight, bias = (name_of(site.module, layer, leaf) for leaf in ("kernel", "bias"))
            assert weight is not None, name
            arguments = (weights, weight, turned, own, scale)
            changed[weight] = partial(_merged_weight, *arguments)
            if config.magnitude_scales_bias and "magnitude" in own and bias:
                changed[bias] = partial(_merged_bias, bias, *arguments)
    return changed


def copies_of_changed(changed: Collection[str], weights: Weights, slots: Mapping[str, Slot]) -> set[str]:
    """The tensors that no leaf is made of and that equal one that is changed: tied to it, and written out.

    Such are a tied ``lm_head.weight`` or T5's ``encoder.embed_tokens.weight``.

    Args:
        changed: names of tensors.
        weights: the base model's.
        slots: which of them fills what.
    """
    tables = [name for name in changed if len(weights.shapes[name]) == 2]
    return {
        name
        for name, shape in weights.shapes.items()
        if name not in slots
        and any(weights.shapes[table] == shape and are_equal(weights, name, table) for table in tables)
    }


def _merged_weight(
    weights: Weights, name: str, turned: bool, leaves: Mapping[str, np.ndarray], scale: float
) -> Pieces:
    read = reader_of(weights, name)
    lora_A, scaled_B, column_scale = _resolved(read, weights.shapes[name], turned, leaves, scale)
    for part in parts_of(weights.shapes[name]):
        # Rows of the file are outputs, or where it is turned, inputs: W' = c ⊙ (W + s·B A) holds for either.
        outputs, inputs = (slice(None), part) if turned else (part, slice(None))
        stored = read(part).astype(np.float64)
        c = None if column_scale is None else column_scale[outputs]
        with jax.enable_x64(True):
            merged = np.asarray(
                _merge(stored.T if turned else stored, lora_A[:, inputs], scaled_B[outputs], c)
            )
        yield merged.T if turned else merged


def _merged_bias(
    bias: str, weights: Weights, name: str, turned: bool, leaves: Mapping[str, np.ndarray], scale: float
) -> Pieces:
    column_scale = _resolved(reader_of(weights, name), weights.shapes[name], turned, leaves, scale)[2]
    assert column_scale is not None  # `changed_tensors` asks for layers that have a magnitude
    yield weights.read(bias).astype(np.float64) * column_scale


def _resolved(
    read: Reader, shape: tuple[int, ...], turned: bool, leaves: Mapping[str, np.ndarray], scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A, s·B and c of one layer in float64, some rows of W [d_out, d_in] at a time."""
    leaves = {leaf: value.astype(np.float64) for leaf, value in leaves.items()}
    scaled_B, column_scale = [], []
    for part in parts_of(shape[::-1] if turned else shape):
        own = {
            leaf: value[part] if leaf_of("linear", leaf).by_row else value for leaf, value in leaves.items()
        }
        weight = read((slice(None), part)).T if turned else read(part)
        with jax.enable_x64(True):
            resolved = _resolve(own, weight.astype(np.float64), np.float64(scale))
            scaled_B.append(np.asarray(resolved["scaled_B"]))
            if "column_scale" in resolved:
                column_scale.append(np.asarray(resolved["column_scale"]))
    return (
        leaves["lora_A"],
        np.concatenate(scaled_B),
        np.concatenate(column_scale) if column_scale else None,
    )


@jax.jit
def _resolve(leaves: dict[str, Array], weight: Array, scale: Array) -> dict[str, Array]:
    squared = low_rank.row_norm_squared(weight)
    return linear_adapter.resolve_leaves(leaves, weight, squared, scale, detach_norm=False)


_merge = jax.jit(low_rank.merged_weight)


def _in_pieces(tensor: np.ndarray) -> Pieces:
    return (tensor[part] for part in parts_of(tensor.shape))


def cast(pieces: Callable[[], Pieces], dtype: np.dtype, name: str, done: Callable[[], Any]) -> Pieces:
    """The pieces in a dtype, each number rounded once.

    Args:
        pieces: gives the values.
        dtype: of the result.
        name: of the tensor, for the message.
        done: called after the last piece.

    Raises:
        ModelError: a value is not finite in the dtype.
    """
    for piece in pieces():
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            rounded = _round_once(piece, dtype)
        if not np.isfinite(rounded).all():
            raise ModelError(
                f"Weights must be finite in {dtype.name}.",
                f"{name} has NaN or infinite values",
                "Write them in a wider dtype; if they are infinite already, the checkpoint is damaged.",
            )
        yield rounded
    done()


def _round_once(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The nearest numbers of a dtype; numpy's way from float64 to bfloat16 rounds to float32 in between."""
    if values.dtype != np.float64 or dtype != DTYPES["BF16"]:
        return values.astype(dtype, copy=False)
    near = values.astype(np.float32)
    # To odd: toward zero, and the last bit set where anything was lost, so that a tie is only what is one.
    bits = near.view(np.uint32) - (np.abs(near) > np.abs(values))
    return (bits | (near != values)).astype(np.uint32).view(np.float32).astype(dtype)
