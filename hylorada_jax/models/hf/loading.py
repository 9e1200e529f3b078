"""Loading Hugging Face's Flax models from PyTorch's files."""

import logging
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import transformers
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from transformers import FlaxPreTrainedModel, PretrainedConfig
from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

from hylorada_jax.errors import HyLoRADAError, ModelError
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.families import FAMILIES, either, flax_of
from hylorada_jax.models.generation_config import Constraints, constraints, read_generation_config
from hylorada_jax.models.hf.faults import check_family, check_hf_flax
from hylorada_jax.models.hf.generate import own_constraints
from hylorada_jax.models.hf.keys import check_keys, check_sizes
from hylorada_jax.models.hf.t5 import RepairedT5, repair_t5
from hylorada_jax.models.inside import files_inside
from hylorada_jax.models.source import Source
from hylorada_jax.models.weights import (
    CONSTANTS,
    Slot,
    Weights,
    check_match,
    check_tied,
    load_tree,
    tensor_names,
)
from hylorada_jax.placement.placement import Placement
from hylorada_jax.terminal import brief
from hylorada_jax.text import short
from hylorada_jax.trees import TreePath


def empty_model(source: Source, dtype: np.dtype) -> FlaxPreTrainedModel:
    """A Flax model of transformers from the config alone, with shapes in the place of its weights.

    Args:
        source: a model directory.
        dtype: of the computation.

    Returns:
        The model, of the Flax class that its config's `architectures` names.

    Raises:
        ModelError: transformers has no such Flax class, or it computes wrongly for this config, or fails; or
            the config's sizes are out of bounds, or are not those of the weights that lie beside it.
    """
    if source.config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise _no_flax_class(source)
    for handler in transformers.logging.get_logger().handlers:
        handler.addFilter(_made_brief)  # adding it again changes nothing
    try:
        return _made(source, dtype)
    except HyLoRADAError:
        raise
    except Exception as error:  # transformers' classes raise any
        raise ModelError(
            "The Flax model must be one that transformers can make from config.json.",
            f"{source.path}: {type(error).__name__}: {error}",
            "Correct config.json, or download it again.",
        ) from error


def _made_brief(record: logging.LogRecord) -> bool:
    """Lets every line of transformers' log through, fit for a terminal whatever a file has put into it."""
    record.msg, record.args = brief(record.getMessage()), ()
    return True


def _made(source: Source, dtype: np.dtype) -> FlaxPreTrainedModel:
    family, architecture = source.config["model_type"], (source.config.get("architectures") or [""])[0]
    flax_class: Any = getattr(transformers, f"Flax{architecture}", None)
    if getattr(flax_class, "config_class", None) is not transformers.CONFIG_MAPPING[family]:
        raise _no_flax_class(source)
    check_family(family)
    config = _read_config(source)
    check_hf_flax(config)
    check_sizes(config, _layers_there(source))
    repaired = flax_of(family).repaired
    with repair_t5() if repaired else nullcontext():  # the constructor traces the model
        model = flax_class(config, dtype=dtype, _do_init=False)
    if repaired:
        model._module = RepairedT5(model.module)
    model._is_initialized = True  # from here on the model accepts and gives out weights
    model.params = unfreeze(model.params_shape_tree)
    if model.can_generate():
        _set_generation(model, source)
    return model


def _set_generation(model: FlaxPreTrainedModel, source: Source) -> None:
    """Gives the model the constraints of generation_config.json, and its end tokens.

    Where there is such a file, transformers reads none of them from config.json.
    """
    own, said = model.generation_config, read_generation_config(source)
    if said:
        for name in Constraints.__struct_fields__:
            setattr(own, name, said.get(name))
    constraints(own_constraints(model), model.config.vocab_size, source.path)
    if ends := end_tokens(source):
        own.eos_token_id = list(ends)


def _read_config(source: Source) -> PretrainedConfig:
    """transformers' config of a file. A null counts as an absent key, or says that there is no such token."""
    family = source.config["model_type"]
    said = {k: v for k, v in source.config.items() if v is not None or k.endswith("token_id")}
    said = flax_of(family).settings(said)
    config_class = transformers.CONFIG_MAPPING[family]
    check_keys(said, config_class)
    config = config_class.from_dict(said)
    config._name_or_path = source.name
    return config


def _layers_there(source: Source) -> int | None:
    """The largest number in the names of the tensors beside a config, counted from one; None without any."""
    try:
        names = [*tensor_names(files_inside(source.path, "*.safetensors"))]
    except ModelError:  # damaged, which is reported when the weights are read, after the user's own mistakes
        return None
    parts = (part for name in names for part in name.split("."))
    return max((int(part) + 1 for part in parts if re.fullmatch("[0-9]{1,9}", part)), default=None)


def load_hf_flax(
    model: FlaxPreTrainedModel,
    source: Source,
    weights: Weights,
    dtype: np.dtype,
    placement: Placement | None = None,
) -> FlaxPreTrainedModel:
    """Load a Flax model of transformers from PyTorch's safetensors, one tensor at a time and without torch.

    Args:
        model: from `empty_model`; it gets the weights.
        source: its directory.
        weights: its tensors.
        dtype: of the weights and of the computation.
        placement: where the weights go.

    Returns:
        The model.

    Raises:
        ModelError: the weights do not fit.

    Warns:
        UserWarning: tensors that the class has no place for, such as a pooler or a second head.
    """
    config = model.config
    leaves, slots = layout(source, model, weights)
    tied = {"lm_head.weight"} & weights.shapes.keys() if config.tie_word_embeddings else set()
    for head in tied:
        alike = [name for name, shape in weights.shapes.items() if shape == weights.shapes[head]]
        check_tied(head, [name for name in alike if name != head], weights)
    leftover = [n for n in weights.shapes if n not in slots and n not in tied and not CONSTANTS.search(n)]
    if leftover:
        warnings.warn(
            f"{source.path}: {type(model).__name__} has no place for {short(sorted(leftover))}", stacklevel=3
        )
    model.params = load_tree(leaves, slots, weights, dtype, placement)
    return model


def layout(
    source: Source, model: FlaxPreTrainedModel, weights: Weights
) -> tuple[dict[TreePath, tuple[int, ...]], dict[str, Slot]]:
    """The leaves of a model with their shapes, and which tensor goes where.

    Raises:
        ModelError: the weights do not fit the model.
    """
    leaves = {path: leaf.shape for path, leaf in flatten_dict(model.params_shape_tree).items()}
    slots = _slots(leaves, weights, model.base_model_prefix)
    check_match(leaves, slots, weights, lambda name: True, source.path)
    return leaves, slots


def _no_flax_class(source: Source) -> ModelError:
    return ModelError(
        "A base model must be one that our decoder reads, or that transformers has in Flax.",
        f"{source.path}: model_type {source.config.get('model_type')!r}, "
        f"architectures {source.config.get('architectures')}",
        f"Choose a model of type {either(FAMILIES)}.",
    )


def _slots(leaves: Mapping[TreePath, tuple[int, ...]], weights: Weights, prefix: str) -> dict[str, Slot]:
    """PyTorch's names to their leaves, as transformers renames them; a leaf without one keeps its path."""
    has_prefix = any(path[0] == prefix for path in leaves)
    slots = {}
    for name, shape in weights.shapes.items():
        parts = tuple(name.split("."))
        if not has_prefix and parts[0] == prefix and len(parts) > 1:
            parts = parts[1:]
        stand_in = np.broadcast_to(np.float32(0), shape)  # only its shape is read; it takes no memory
        path, _ = rename_key_and_reshape_tensor(parts, stand_in, leaves, prefix)
        if path not in leaves:
            path = (prefix, *path)
        if path in leaves:
            # A kernel comes from a PyTorch weight by transposition; what keeps its name stays as it is.
            slots[name] = Slot(path, transpose=path[-1] == "kernel")
    filled = {slot.path for slot in slots.values()}
    return slots | {".".join(path): Slot(path) for path in leaves if path not in filled}
