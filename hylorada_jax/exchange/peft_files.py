"""PEFT's two files, adapter_config.json and adapter_model.safetensors: their names, read and written."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as dump_safetensors

from hylorada_jax.config import MAX_NUMBER, MAX_PATTERN_LENGTH, MAX_PATTERNS, MAX_SIZE
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io.files import any_path, kind_of
from hylorada_jax.io.hub import fetched_first
from hylorada_jax.io.reading import checked, read_bounded, read_json
from hylorada_jax.io.safetensors_header import read_header
from hylorada_jax.leaves import LEAVES
from hylorada_jax.models.chat_template import TEMPLATE_NAME, read_template
from hylorada_jax.models.families import family_of
from hylorada_jax.models.text_part import text_name
from hylorada_jax.saved.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_file,
    check_finite,
    refuse_existing,
    write_files,
)
from hylorada_jax.saved.saved_adapter import MAX_CONFIG_BYTES
from hylorada_jax.text import short, shown

_WHOLE, _REMEDY = f"{WEIGHTS_NAME} must be a complete safetensors file.", "Copy it again."
_PREFIX = "base_model.model."
_LEAVES = {leaf.name: leaf.peft for leaf in LEAVES if leaf.peft}
# VeLoRA's, which only its backward pass reads.
_OF_TRAINING = ".lora_velora_embed"
_Pattern = Annotated[str, Meta(max_length=MAX_PATTERN_LENGTH)]
_FLOATS = ("F16", "BF16", "F32", "F64")
_Rank = Annotated[int, Meta(ge=1, le=MAX_SIZE)]
_Alpha = Annotated[float, Meta(gt=0, le=MAX_NUMBER)]


class _Settings(msgspec.Struct):
    """What of PEFT's LoraConfig we read, with PEFT's defaults."""

    peft_type: str
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Annotated[dict[_Pattern, _Rank], Meta(max_length=MAX_PATTERNS)] = {}
    alpha_pattern: Annotated[dict[_Pattern, _Alpha], Meta(max_length=MAX_PATTERNS)] = {}
    modules_to_save: Annotated[list[_Pattern], Meta(max_length=MAX_PATTERNS)] = []
    bias: str = "none"
    init_lora_weights: bool | str = True


# What says nothing of the function, and what says something only where another key asks for it.
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
    """PEFT's name of a tensor of the model that PEFT has.

    Example:
        >>> peft_name("h.0.c_attn.magnitude"), peft_name("h.0.ln_1.weight")
        ('base_model.model.h.0.c_attn.lora_magnitude_vector', 'base_model.model.h.0.ln_1.weight')
    """
    layer, leaf = name.rsplit(".", 1)
    return f"{_PREFIX}{layer}.{_LEAVES.get(leaf, leaf)}"


def tied_head(model_type: str) -> str:
    """The weight that a family of models can tie to its embedding."""
    return f"{family_of(model_type).heads[0]}.weight"


def write_peft(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes an adapter as PEFT does.

    Args:
        directory: made if it does not exist.
        tensors: {layer name + "." + leaf name: array}, by the names of the model that PEFT has.
        settings: of PEFT's LoraConfig.
        beside: texts by the names of their files.

    Raises:
        CheckpointError: an adapter, or one of these files, is already there, or the directory cannot be
            written.
    """
    directory = any_path(directory)
    refuse_taken(directory, beside)
    named = {peft_name(name): np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # A path of the base may have bytes that are not UTF-8.
    config = json.dumps(settings, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
    files = {name: text.encode(errors="backslashreplace") for name, text in beside.items()}
    write_files(directory, dump_safetensors(named, {"format": "pt"}), config, files)


def refuse_taken(directory: str | Path, beside: Iterable[str]) -> None:
    """Raises a CheckpointError where :func:`write_peft` would, for files of these names; changes nothing."""
    directory = any_path(directory)
    refuse_existing(directory)
    for name in beside:
        if kind_of(directory / name):
            rule = f"This adapter comes with a {name}, which replaces none."
            raise CheckpointError(rule, directory, "Choose another directory.")


@dataclasses.dataclass(frozen=True)
class SavedPeft:
    """An adapter of PEFT's on disk, of which only the config and the header of the weights have been read.

    Attributes:
        path: of the file with the tensors.
        settings: of its LoraConfig, PEFT's defaults in place of what is absent or null.
        shapes: of its tensors, under our names.
        names: PEFT's names of these.
        chat_template: the one that lies beside them, or None.
    """

    path: Path
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str]
    chat_template: str | None

    @property
    def layers(self) -> dict[str, str]:
        """The layers that have an A: PEFT's names by ours."""
        own = {name: theirs for name, theirs in self.names.items() if name.endswith(".lora_A")}
        return {
            name.removesuffix(".lora_A"): theirs.removeprefix(_PREFIX).partition(".lora_A")[0]
            for name, theirs in own.items()
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Reads the tensors, float32 at least: after ``shapes`` have been compared with what is needed.

        Raises:
            CheckpointError: they cannot be read, or hold non-finite values.
        """
        raw = read_bounded(self.path, _WHOLE, CheckpointError, _REMEDY, limit=sys.maxsize)
        try:
            found = load_safetensors(raw)
            tensors = {name: _at_least_float32(found[theirs]) for name, theirs in self.names.items()}
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(_WHOLE, f"{self.path}: {error}", _REMEDY) from error
        check_finite(tensors)
        return tensors


def open_peft(directory: str | Path) -> SavedPeft:
    """Opens an adapter that PEFT has saved, as far as its config and the header of its weights.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, lies outside the directory, has values of other types,
            or has a tensor that LoRA and DoRA do not have.
        ConfigError: a setting asks for what this library does not have; it is named.
        DataError: a chat template beside it cannot be read, or is not jinja.
    """
    directory = any_path(directory)
    settings = _read_settings(adapter_file(directory, CONFIG_NAME))
    path = adapter_file(directory, WEIGHTS_NAME)
    if not _may_be_there(path):
        pickled = _may_be_there(directory / "adapter_model.bin")
        raise CheckpointError(
            f"An adapter of PEFT holds its tensors in {WEIGHTS_NAME}.",
            f"{directory}: {'adapter_model.bin, a pickle, which runs code when read' if pickled else 'none'}",
            "Save it with PEFT's save_pretrained(directory, safe_serialization=True).",
        )
    header = read_header(path, _WHOLE, CheckpointError, _REMEDY)
    theirs = {name: known for name, known in header.items() if not name.endswith(_OF_TRAINING)}
    if alien := [f"{name} {dtype}" for name, (dtype, _) in theirs.items() if dtype not in _FLOATS]:
        raise CheckpointError("An adapter holds floating-point tensors.", short(alien), "Save it with PEFT.")
    names = {_our_name(name, path): name for name in theirs}
    if twice := sorted(theirs.keys() - names.values()):
        raise CheckpointError("An adapter holds a tensor once.", short(twice), "Save it with PEFT.")
    template = adapter_file(directory, TEMPLATE_NAME)
    return SavedPeft(
        path,
        settings,
        {ours: theirs[name][1] for ours, name in names.items()},
        names,
        read_template(template) if _may_be_there(template) else None,
    )


def _may_be_there(path: Path) -> bool:
    """Whether there is something at a path; yes where that cannot be known, for reading it says why."""
    try:
        return kind_of(path) is not None
    except OSError:
        return True


def _read_settings(path: Path) -> dict[str, Any]:
    """What the config says, for what we read; refuses the rest where it says something."""
    rule = f"An adapter of PEFT has an {CONFIG_NAME}."
    remedy = fetched_first(path.parent, "Check the path.")
    found = read_json(path, rule, CheckpointError, remedy, limit=MAX_CONFIG_BYTES)
    if found.get("format") == "hylorada":
        raise CheckpointError(
            "An adapter of PEFT is to be read.", f"{path}, one of this library's", "Use it as it is."
        )
    if (kind := found.get("peft_type")) != "LORA":
        raise ConfigError(
            "PEFT's LoRA and DoRA can be read.", f"peft_type {shown(kind)}", "Train a LoRA adapter."
        )
    # To PEFT, null is not a setting, but for the two numbers without which there is no adapter.
    said = {key: value for key, value in found.items() if value is not None or key in ("r", "lora_alpha")}
    rule = f"{CONFIG_NAME} must be what PEFT's save_pretrained wrote: {path}."
    settings = msgspec.structs.asdict(checked(said, _Settings, rule, CheckpointError, "Save it again."))
    unknown = {key: value for key, value in said.items() if key not in (*settings, *_IDLE) and value}
    if settings["bias"] != "none":
        unknown["bias"] = settings["bias"]
    if str(settings["init_lora_weights"]).lower() not in _PLAIN_STARTS:
        unknown["init_lora_weights"] = settings["init_lora_weights"]
    if unknown:
        raise ConfigError(
            "Every setting of PEFT's that changes the function must be one this library has.",
            short([f"{key}={shown(value)}" for key, value in unknown.items()]),
            _remedy(unknown),
        )
    settings["modules_to_save"] = [text_name(name) or name for name in settings["modules_to_save"]]
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
    name = text_name(theirs.removeprefix(_PREFIX)) or theirs
    for ours, ending in _LEAVES.items():
        for known in (ending, f"{ending}.weight"):
            if name.endswith("." + known):
                return name.removesuffix(known) + ours
    if name == theirs or not name.endswith((".weight", ".bias")) or ".lora_" in name:
        raise CheckpointError(
            "Every tensor must be LoRA's or DoRA's of a linear layer, or a module's that was saved whole.",
            f"{short([theirs])} in {path}",
            f"{MERGE} Where it adapts an embedding that is tied to the head: train one of linear layers.",
        )
    return name


def _at_least_float32(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype in (np.float32, np.float64) else tensor.astype(np.float32)
