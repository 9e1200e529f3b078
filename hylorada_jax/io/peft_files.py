"""PEFT's two files, adapter_config.json and adapter_model.safetensors: their names, read and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as dump_safetensors

from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_finite,
    refuse_existing,
    write_files,
)
from hylorada_jax.io.files import user_path
from hylorada_jax.leaves import LEAVES

_PREFIX = "base_model.model."
_LEAVES = {leaf.name: leaf.peft for leaf in LEAVES if leaf.peft}
# VeLoRA's, which only its backward pass reads.
_OF_TRAINING = ".lora_velora_embed"
# The embedding that an output head can be tied to, by the families' names of it.
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared")
# What we read; what says nothing of the function; and what says something only where another key asks for it.
_READ = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out",
    "rank_pattern", "alpha_pattern", "modules_to_save",
)  # fmt: skip
_IDLE = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    "megatron_config", "megatron_core", "qalora_group_size", "runtime_config",
    # Of the starts, which init_lora_weights names.
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    # A backward pass of its own, and the forward pass of LoRA.
    "velora_config",
)  # fmt: skip
# Starts that leave the base model's weights as they are, and those that take the start out of them.
_PLAIN_STARTS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_STARTS_IN_THE_BASE = ("pissa", "corda", "olora", "lora_ga")
# What PEFT cannot merge either.
_UNMERGEABLE = ("alora_invocation_tokens", "layer_replication", "use_qalora", "arrow_config")
MERGE = "In PEFT, model.merge_and_unload().save_pretrained(directory) makes a base model that has it."
NEW_BASE = (
    "PeftModel.from_pretrained(base, adapter).unload().save_pretrained(directory) makes a base model with "
    "it: import the adapter on that."
)


def peft_name(name: str) -> str:
    """PEFT's name of a tensor of ours.

    Example:
        >>> peft_name("h.0.c_attn.magnitude"), peft_name("h.0.ln_1.weight")
        ('base_model.model.h.0.c_attn.lora_magnitude_vector', 'base_model.model.h.0.ln_1.weight')
    """
    layer, leaf = name.rsplit(".", 1)
    return f"{_PREFIX}{layer}.{_LEAVES.get(leaf, leaf)}"


def tied_head(model_type: str) -> str:
    """The weight that a family of models can tie to its embedding."""
    return "cls.predictions.decoder.weight" if model_type == "bert" else "lm_head.weight"


def write_peft(directory: str | Path, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
    """Writes an adapter as PEFT does.

    Args:
        directory: made if it does not exist.
        tensors: {layer name + "." + leaf name: array}.
        settings: of PEFT's LoraConfig.

    Raises:
        CheckpointError: an adapter is already there, or the directory cannot be written.
    """
    directory = user_path(directory)
    refuse_existing(directory)
    named = {peft_name(name): np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    config = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    write_files(directory, dump_safetensors(named, {"format": "pt"}), config)


def read_peft(directory: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads an adapter that PEFT has saved.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The tensors under our names, float32 at least, and the settings of its LoraConfig.

    Raises:
        CheckpointError: a file is missing or damaged, or holds what is no tensor of LoRA or DoRA.
        ConfigError: a setting asks for what this library does not have; it is named.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"An adapter of PEFT holds its tensors in {WEIGHTS_NAME}",
            f"{directory}: {'adapter_model.bin, a pickle, which runs code when read' if pickled else 'none'}",
            "Save it with PEFT's save_pretrained(directory, safe_serialization=True).",
        )
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for theirs in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if not theirs.endswith(_OF_TRAINING):
                    tensors[_our_name(theirs, path)] = _at_least_float32(file.get_tensor(theirs), theirs)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{WEIGHTS_NAME} must be a complete safetensors file", f"{path}: {error}", "Copy it again."
        ) from error
    check_finite(tensors)
    return tensors, settings


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        settings = json.loads(path.read_bytes())
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"An adapter of PEFT has an {CONFIG_NAME}", f"{path}: {error}", "Check the path."
        ) from error
    if settings.get("format") == "hylorada":
        raise CheckpointError(
            "An adapter of PEFT is to be read", f"{path}, one of this library's", "Use it as it is."
        )
    if kind != "LORA":
        raise ConfigError("PEFT's LoRA and DoRA can be read", f"peft_type {kind!r}", "Train a LoRA adapter.")
    settings = {"r": 8, "lora_alpha": 8} | {
        key: value for key, value in settings.items() if value is not None
    }
    if not all(isinstance(settings[key], int | float) and settings[key] > 0 for key in ("r", "lora_alpha")):
        raise CheckpointError(
            "r and lora_alpha must be positive numbers",
            f"r={settings['r']!r}, lora_alpha={settings['lora_alpha']!r} in {path}",
            "Save it with PEFT again.",
        )
    start = settings.pop("init_lora_weights", True)
    unknown = {key: value for key, value in settings.items() if key not in (*_READ, *_IDLE) and value}
    if settings.get("bias", "none") == "none":
        unknown.pop("bias", None)
    if str(start).lower() not in _PLAIN_STARTS:
        unknown["init_lora_weights"] = start
    if unknown:
        raise ConfigError(
            "Every setting of PEFT's that changes the function must be one this library has",
            ", ".join(f"{key}={value!r}" for key, value in unknown.items()),
            _remedy(unknown),
        )
    return settings


def _remedy(unknown: Mapping[str, Any]) -> str:
    if any(key in unknown for key in _UNMERGEABLE):
        return "Train an adapter without; PEFT cannot merge one with it."
    if str(unknown.get("init_lora_weights")).lower().startswith(_STARTS_IN_THE_BASE) and len(unknown) == 1:
        return (
            "Where it was trained, save it as LoRA of the untouched base, save_pretrained(directory, "
            "path_initial_model_for_weight_conversion=the adapter saved before training); or merge it there. "
            + MERGE
        )
    return f"{MERGE} Or train an adapter without."


def _our_name(theirs: str, path: Path) -> str:
    name = theirs.removeprefix(_PREFIX)
    for ours, ending in _LEAVES.items():
        for known in (ending, f"{ending}.weight"):
            if name.endswith("." + known):
                return name.removesuffix(known) + ours
    if name == theirs or not name.endswith((".weight", ".bias")) or ".lora_" in name:
        raise CheckpointError(
            "Every tensor must be LoRA's or DoRA's of a linear layer, or a module's that was saved whole",
            f"{theirs} in {path}",
            f"{MERGE} Where it adapts an embedding that is tied to the head: train one of linear layers.",
        )
    return name


def _at_least_float32(tensor: np.ndarray, name: str) -> np.ndarray:
    if tensor.dtype in (np.float32, np.float64):
        return tensor
    if tensor.dtype.name not in ("float16", "bfloat16"):
        raise CheckpointError(
            "An adapter holds floating-point tensors", f"{name} {tensor.dtype}", "Save it with PEFT."
        )
    return tensor.astype(np.float32)
