"""Load a base model by name: our decoder where it reads the family, else Hugging Face's Flax classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import DTypeLike

from hylorada_jax.errors import ModelError
from hylorada_jax.math.quantized import float_dtype
from hylorada_jax.models.bitsandbytes import BitsAndBytesWeights
from hylorada_jax.models.causal_lm import CausalLM, param_shapes
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.families import DECODERS, FLAX, either
from hylorada_jax.models.gguf import GGUFWeights
from hylorada_jax.models.layer_loops import check_remat
from hylorada_jax.models.mixture import EXPERTS, each_expert
from hylorada_jax.models.mxfp4 import MXFP4Weights
from hylorada_jax.models.placed import fitted
from hylorada_jax.models.quantize import read_quantized, shapes_kept
from hylorada_jax.models.quantized_elsewhere import BITSANDBYTES_4BIT, MXFP4, quant_method, refuse_quantized
from hylorada_jax.models.source import Source, find_source
from hylorada_jax.models.stacks import names_in_stack
from hylorada_jax.models.weights import (
    SafetensorsWeights,
    Slot,
    Weights,
    check_match,
    check_tied,
    load_tree,
)
from hylorada_jax.placement.placement import Placement
from hylorada_jax.trees import TreePath, is_quantized

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

# A leaf of another name is a parameter that HF's module has by the same name.
_TENSOR_SUFFIX = {"embedding": "weight", "kernel": "weight", "scale": "weight", "input_scale": "scale"}
_KEYS_VALUES = re.compile(r"model\.layers\.([0-9]+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_READERS = {MXFP4: MXFP4Weights, BITSANDBYTES_4BIT: BitsAndBytesWeights}


def load_model(
    name: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    base_dtype: str | None = None,
    remat: str = "none",
    placement: Placement | None = None,
) -> CausalLM | FlaxPreTrainedModel:
    """Load a pretrained base model, its weights memory-mapped and read one tensor at a time.

    Args:
        name: 'smollm2-135m', a directory, a .gguf file or a Hub name; see `find_source`. Before the Hub is
            contacted its name is printed on stderr; under :func:`hylorada_jax.offline` the cache is read.
        dtype: of the weights and of the computation: float32, bfloat16, float16, or float64 under x64.
        base_dtype: 'int8' or 'nf4' keeps the linear layers of our decoder in 8 or 4 bits, quantised one
            by one as they are read and dequantised to ``dtype`` where they are used; 'int8+head' and
            'nf4+head' the output head too; None: in ``dtype``.
        remat: what the backward pass of our decoder keeps, see `DecoderLM`; not available for HF Flax models.
        placement: the mesh over which its weights are sharded, each device reading its own share; None: all
            go to the default device.

    Returns:
        Our decoder for the families of ``families.DECODERS`` (Llama, Gemma, Qwen3, Phi-3 …); a Flax
        model of transformers for the others of ``families.FLAX`` (GPT-2, GPT-Neo, OPT, BERT, BART …).

    Raises:
        ModelError: the model is not found, does not fit its config, is damaged, or would be computed wrongly.
        ConfigError: the placement would cut an attention head; there is no such base_dtype, or its package is
            not installed.

    Example:
        model = load_model("smollm2-135m", dtype=jnp.bfloat16)
        model(jnp.array([[1, 2, 3]])).logits  # [1, 3, 49152]
    """
    dtype = _float_dtype(dtype)
    source = find_source(name, config_only=True)
    # Refuses what it can before weights are looked for, or fetched.
    empty = _empty(source, dtype, remat, base_dtype)
    placement = placement and fitted(placement, empty)
    if source.gguf is None:
        said, source = source.config, find_source(name)
        if source.config != said:  # where the weights, fetched since, say whether the head is tied
            empty = _empty(source, dtype, remat, base_dtype)
    weights = open_weights(source)
    if isinstance(empty, CausalLM):
        return _load_decoder(empty, source, weights, dtype, placement)
    return _hf_flax(source).load_hf_flax(empty, source, weights, dtype, placement)


def empty_model(
    name: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    base_dtype: str | None = None,
    remat: str = "none",
) -> CausalLM | FlaxPreTrainedModel:
    """A base model as `load_model` gives it, with shapes in the place of its weights.

    It tells in a moment, and from the config alone, what a model is and whether a setting fits it.

    Args:
        name: as for `load_model`; a Hub name fetches no weights.
        dtype: as for `load_model`.
        base_dtype: as for `load_model`.
        remat: as for `load_model`.

    Returns:
        The model; its parameters are ``jax.ShapeDtypeStruct``.

    Raises:
        ModelError: the model is not found, its config is of no family that is read, or it would be computed
            wrongly.
        ConfigError: there is no such remat or base_dtype.

    Example:
        >>> empty_model("smollm2-135m").params["model"]["embed_tokens"]["embedding"].shape
        (49152, 576)
    """
    return _empty(find_source(name, config_only=True), _float_dtype(dtype), remat, base_dtype)


def _empty(
    source: Source, dtype: np.dtype, remat: str, base_dtype: str | None
) -> CausalLM | FlaxPreTrainedModel:
    if source.config.get("model_type") in DECODERS:
        config = DecoderConfig.from_hf(source.config)
        module = DecoderLM(config, check_remat(remat))
        ends = end_tokens(source, config.vocab_size) or config.eos_token_ids
        params = shapes_kept(param_shapes(config, dtype), base_dtype)
        return CausalLM(module, params, config, source.name, ends, source.inside)
    if base_dtype is not None:
        raise ModelError(
            "Only our decoder's weights are kept in int8 or nf4.",
            f"base_dtype={base_dtype!r} for model_type {source.config.get('model_type')!r}",
            f"Leave base_dtype out, or choose a model of type {either(DECODERS)}.",
        )
    if remat != "none":
        raise ModelError(
            "Rematerialisation is a feature of our decoder.",
            f"remat={remat!r} for model_type {source.config.get('model_type')!r}",
            f"Leave remat at 'none', or choose a model of type {either(DECODERS)}.",
        )
    if source.config.get("model_type") in FLAX:  # of another family it would not be the reason
        refuse_quantized(source.config)
    return _hf_flax(source).empty_model(source, dtype)


def _hf_flax(source: Source) -> ModuleType:
    """The file that imports transformers, where that is there to be imported."""
    try:
        from hylorada_jax.models.hf import loading
    except ImportError as error:
        raise ModelError(
            f"Models that are not of type {either(DECODERS)} run in Flax classes of transformers 4.57, which "
            "transformers 5 no longer has.",
            f"model_type {source.config.get('model_type')!r}; {_installed('transformers')}",
            'Install it: `pip install "hylorada[hf]"`.',
        ) from error
    return loading


def _installed(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    dtype = float_dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ModelError(
            "float64 weights need 64-bit mode; without it jax would store them as float32.",
            f"dtype {dtype.name}",
            "Set jax.config.update('jax_enable_x64', True) first, or use float32.",
        )
    return dtype


def open_weights(source: Source) -> Weights:
    """The tensors of a base model on disk, under Hugging Face's names; none is read yet."""
    if source.gguf:
        return GGUFWeights(source.gguf)
    kind = _READERS.get(quant_method(source.config) or "", SafetensorsWeights)
    return kind(source.weights, inside=source.inside)


class WeightsLayout(NamedTuple):
    """What `load_model` makes of a model's files.

    Attributes:
        leaves: path and shape of every leaf.
        slots: tensor name to its place.
        weights: the tensors.
    """

    leaves: dict[TreePath, tuple[int, ...]]
    slots: dict[str, Slot]
    weights: Weights


def weights_layout(source: Source, empty: CausalLM | FlaxPreTrainedModel | None = None) -> WeightsLayout:
    """The layout of a model's files, of which the header alone is read.

    Args:
        source: the model, with its weights.
        empty: what :func:`empty_model` makes of it, not quantised; it is made where it is not given.

    Raises:
        ModelError: the weights do not fit the config.
    """
    weights = open_weights(source)
    if empty is None:
        empty = _empty(source, np.dtype(np.float32), "none", None)
    if isinstance(empty, CausalLM):
        leaves, slots = _decoder_layout(empty, source, weights)
    else:
        leaves, slots = _hf_flax(source).layout(source, empty, weights)
    return WeightsLayout(leaves, slots, weights)


def _decoder_layout(
    empty: CausalLM, source: Source, weights: Weights
) -> tuple[dict[TreePath, tuple[int, ...]], dict[str, Slot]]:
    leaves = {path: leaf.shape for path, leaf in flatten_dict(empty.params).items()}
    layout = empty.layer_numbers, DECODERS[empty.config.model_type].experts_out_in
    slots = {name: slot for path, shape in leaves.items() for name, slot in _slots(path, shape, *layout)}
    check_match(leaves, slots, weights, partial(_is_harmless, empty.config, weights), source.path)
    return leaves, slots


def _load_decoder(
    empty: CausalLM, source: Source, weights: Weights, dtype: np.dtype, placement: Placement | None
) -> CausalLM:
    leaves, slots = _decoder_layout(empty, source, weights)
    kernels = {path: leaf for path, leaf in flatten_dict(empty.params).items() if is_quantized(leaf)}
    rest = {path: shape for path, shape in leaves.items() if path not in kernels}
    params = flatten_dict(load_tree(rest, _of(rest, slots), weights, dtype, placement))
    places = flatten_dict(placement.shardings(empty.params)) if placement else {}
    for path, leaf in kernels.items():
        tensors = _of([path], slots).items()
        params[path] = read_quantized(leaf, tensors, weights, places.get(path))
    return empty.with_params(unflatten_dict(params))


def _of(paths: Collection[TreePath], slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The tensors that fill some of the leaves."""
    return {name: slot for name, slot in slots.items() if slot.path in paths}


def _slots(
    path: TreePath,
    shape: tuple[int, ...],
    numbers: Mapping[TreePath, tuple[int, ...]],
    experts_out_in: bool = False,
) -> list[tuple[str, Slot]]:
    """The tensors that fill one leaf of our decoder: one, or one per layer, and expert, that it stacks.

    With ``experts_out_in`` a tensor of all experts is [experts, out, in], and not as the leaf has it.
    """
    *module, leaf = path
    suffix = _TENSOR_SUFFIX.get(leaf, leaf)
    transpose = leaf == "kernel" or (experts_out_in and module[-1] == EXPERTS)
    names = names_in_stack(tuple(module), numbers)
    if names is None:
        return [(".".join([*module, suffix]), Slot(path, (), transpose))]
    found = []
    for layer, name in enumerate(names):
        if EXPERTS in module and leaf == "kernel":
            experts = enumerate(each_expert(name, shape[1]))
            found += [(f"{own}.{suffix}", Slot(path, (layer, e), transpose)) for e, own in experts]
        else:
            found.append((f"{name}.{suffix}", Slot(path, (layer,), transpose)))
    return found


def _is_harmless(config: DecoderConfig, weights: Weights, name: str) -> bool:
    """Whether an extra tensor carries nothing.

    Such are rotary frequencies, a tied head that is written out, and what checkpoints have of the keys and
    values of layers that take those of others.
    """
    if found := _KEYS_VALUES.match(name):
        depth = config.num_hidden_layers
        return depth - config.shared_kv_layers <= int(found[1]) < depth
    if name == "lm_head.weight" and config.tie_word_embeddings:
        check_tied(name, ["model.embed_tokens.weight"], weights)
        return True
    return name.endswith(".rotary_emb.inv_freq")
