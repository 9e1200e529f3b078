"""Load a base model by name: our decoder for the Llama family, Hugging Face's Flax classes for the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from numpy.typing import DTypeLike

from hylorada_jax.errors import ModelError
from hylorada_jax.models.causal_lm import CausalLM, init_params, param_shapes
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.gguf import GGUFWeights
from hylorada_jax.models.source import Source, find_source
from hylorada_jax.models.weights import SafetensorsWeights, Slot, TreePath, Weights, check_match, load_tree

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

DECODER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Constants that old checkpoints carry as tensors, and transformers computes: masks, positions, frequencies.
CONSTANTS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.position_ids$|\.inv_freq$")

_TENSOR_SUFFIX = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}


def load_model(
    name: str | Path, *, dtype: DTypeLike = jnp.float32, remat: str = "none"
) -> CausalLM | FlaxPreTrainedModel:
    """Load a pretrained base model, its weights memory-mapped and read one tensor at a time.

    Args:
        name: 'smollm2-135m', a directory, a .gguf file or a Hub name; see `find_source`.
        dtype: of the weights and of the computation: float32, bfloat16, float16, or float64 under x64.
        remat: what the backward pass of our decoder keeps, see `DecoderLM`; not available for HF Flax models.

    Returns:
        Our decoder for Llama, SmolLM2, Mistral, Qwen2 and Qwen3; a Flax model of transformers for families
        that only it has (GPT-2, GPT-Neo, OPT, BERT, BART …).

    Raises:
        ModelError: the model is not found, does not fit its config, is damaged, or would be computed wrongly.

    Example:
        model = load_model("smollm2-135m", dtype=jnp.bfloat16)
        model(jnp.array([[1, 2, 3]])).logits  # [1, 3, 49152]
    """
    dtype = _float_dtype(dtype)
    source = find_source(name)
    weights = open_weights(source)
    if source.config.get("model_type") in DECODER_FAMILIES:
        return _load_decoder(source, weights, dtype, remat)
    if remat != "none":
        raise ModelError(
            "Rematerialisation is a feature of our decoder.",
            f"remat={remat!r} for model_type {source.config.get('model_type')!r}",
            "Leave remat at 'none', or choose a model of the Llama family.",
        )
    return _hf_flax(source).load_hf_flax(source, weights, dtype)


def model_init(name: str | Path) -> Callable[[Array], Any]:
    """The initialisation of a model of random weights, from its config alone.

    Traced by ``jax.eval_shape``, it tells the model's modules and shapes without weights or memory.

    Args:
        name: as for `load_model`; a Hub name fetches no weights.

    Returns:
        A function from a ``jax.random`` key to a parameter tree.

    Raises:
        ModelError: the model is not found, or its config is of no family that is read.

    Example:
        >>> shapes = jax.eval_shape(model_init("smollm2-135m"), jax.random.key(0))
        >>> shapes["model"]["embed_tokens"]["embedding"].shape
        (49152, 576)
    """
    return config_and_init(find_source(name, config_only=True))[1]


def config_and_init(source: Source) -> tuple[Any, Callable[[Array], Any]]:
    """A model's config, as the loaded model has it, and the initialisation as `model_init` gives it."""
    if source.config.get("model_type") in DECODER_FAMILIES:
        config = DecoderConfig.from_hf(source.config)
        return config, partial(init_params, config)
    model = _hf_flax(source).empty_model(source, np.dtype(np.float32))
    return model.config, lambda key: model.init_weights(key, model.input_shape)


def _hf_flax(source: Source) -> ModuleType:
    """The file that imports transformers, where that is there to be imported."""
    try:
        from hylorada_jax.models import hf_flax_loading
    except ImportError as error:
        raise ModelError(
            "Models outside the Llama family need transformers, in a version that has Flax models.",
            f"model_type {source.config.get('model_type')!r}; {error}",
            "pip install 'transformers>=4.57,<5'",
        ) from error
    return hf_flax_loading


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ModelError(
            "Weights are floating-point numbers.", f"dtype {dtype.name}", "Use float32 or bfloat16."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ModelError(
            "float64 weights need 64-bit mode; without it jax would store them as float32.",
            f"dtype {dtype.name}",
            "Set jax.config.update('jax_enable_x64', True) first, or use float32.",
        )
    return dtype


def open_weights(source: Source) -> Weights:
    """The tensors of a base model on disk, under Hugging Face's names; none is read yet."""
    return GGUFWeights(source.gguf) if source.gguf else SafetensorsWeights(source.weights)


def _load_decoder(source: Source, weights: Weights, dtype: np.dtype, remat: str) -> CausalLM:
    config = DecoderConfig.from_hf(source.config)
    leaves = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config)).items()}
    slots = {name: slot for path, shape in leaves.items() for name, slot in _slots(path, shape)}
    check_match(leaves, slots, weights, partial(_is_harmless, config, weights), source.path)
    params = load_tree(leaves, slots, weights, dtype)
    ends = end_tokens(source) or config.eos_token_ids
    return CausalLM(DecoderLM(config, remat), params, config, source.name, ends)


def _slots(path: TreePath, shape: tuple[int, ...]) -> list[tuple[str, Slot]]:
    """The tensors that fill one leaf of our decoder: one, or one per layer where the leaf stacks them."""
    *module, leaf = path
    suffix, transpose = _TENSOR_SUFFIX[leaf], leaf == "kernel"
    if "layers" not in module:
        return [(".".join([*module, suffix]), Slot(path, None, transpose))]
    after = module.index("layers") + 1
    return [
        (".".join([*module[:after], str(layer), *module[after:], suffix]), Slot(path, layer, transpose))
        for layer in range(shape[0])
    ]


def _is_harmless(config: DecoderConfig, weights: Weights, name: str) -> bool:
    """Whether an extra tensor carries nothing: rotary frequencies, or a tied head that is written out."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        if not np.array_equal(weights.read(name), weights.read("model.embed_tokens.weight")):
            raise ModelError(
                "With tie_word_embeddings the output head must equal the input embedding.",
                f"{name} in {weights.file_of(name)} differs from model.embed_tokens.weight",
                "Set tie_word_embeddings to false in config.json if the head was trained apart.",
            )
        return True
    return name.endswith(".rotary_emb.inv_freq")
