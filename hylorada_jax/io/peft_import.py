"""An adapter that PEFT has saved, to go on from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io.adapter_files import check_keys, digest, short
from hylorada_jax.io.peft_files import MERGE, read_peft
from hylorada_jax.io.peft_whole import settle_whole
from hylorada_jax.math.linear_adapter import LEAVES
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.face import as_base
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.collapse import expand
from hylorada_jax.surgery.modules import find_modules
from hylorada_jax.surgery.targets import is_head, shortest_targets


def import_peft(base_model: Any, directory: str | Path, *, method: str | None = None) -> HyLoRADAModel:
    """A model that carries an adapter PEFT has saved, and goes on training from there.

    Args:
        base_model: the model it was trained on, as for :class:`HyLoRADAModel`.
        directory: holds PEFT's adapter_config.json and adapter_model.safetensors.
        method: lora or dora, as the file has it, when None; a DoRA adapter can also start ``hylorada_v1``,
            whose magnitude is set so that at its ordinary gates it computes the same.

    Returns:
        The adapted model, in the dtype of its base.

    Raises:
        CheckpointError: the files are damaged, or fit another model.
        ConfigError: the adapter uses what this library does not have, or cannot start that method.

    Example:
        model = import_peft(load_model("smollm2-135m"), "runs/peft", method="hylorada_v1")

    Source: method.md §1, Collapse, solved for the magnitude.
    """
    tensors, settings = read_peft(directory)
    method = _method(settings, method)
    if heads := [name for name in _adapted(tensors) if is_head(name)]:
        raise ConfigError(
            "An output head is not adapted here", short(heads), f"{MERGE} A tied head: train one without it."
        )
    base = as_base(base_model)
    modules = find_modules(base.init_params)
    tensors, trained = settle_whole(tensors, settings, base, modules)
    config = _config(tensors, settings, modules.linear_names, method, trained)
    model = HyLoRADAModel(base_model, config)
    if config.method == "hylorada_v1":
        check_keys({name: tensor.shape for name, tensor in tensors.items()}, _dora_shapes(model))
        tensors = tensors | expand(model.sites, tensors, model.base.params, model.frozen["constants"], config)
    model.adapters = layout.unflatten(model.sites, _of_dtype(model, tensors))
    model.start = digest(tensors)
    return model


def _method(settings: Mapping[str, Any], method: str | None) -> str:
    """The method that goes on from an adapter."""
    theirs = "dora" if settings.get("use_dora") else "lora"
    if (method or theirs) not in ({"lora"} if theirs == "lora" else {"dora", "hylorada_v1"}):
        raise ConfigError(
            "LoRA goes on as lora, DoRA as dora or hylorada_v1",
            f"method={method!r} for an adapter of {theirs}",
            "Choose one of these.",
        )
    return method or theirs


def _config(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    names: list[str],
    method: str,
    trained: tuple[bool, bool],
) -> HyLoRADAConfig:
    """Our config of what PEFT's file holds: the layers that its tensors name, each with its rank and α."""
    ranks = {name: len(tensors[f"{name}.lora_A"]) for name in _adapted(tensors)}
    stated = {name: _by_pattern(settings, "rank_pattern", "r", name) for name in ranks}
    if alien := sorted(set(ranks) - set(names)):
        raise CheckpointError(
            "The adapter's layers must be linear layers of the model",
            f"{short(alien)}; the model has {short(names)}",
            "Load the base model that the adapter was trained on.",
        )
    if wrong := [f"{name}: {ranks[name]}, not {r}" for name, r in stated.items() if r != ranks[name]]:
        raise CheckpointError(
            "The tensors must have the ranks of their config", short(wrong), "Save it again."
        )
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    alphas = {name: float(_by_pattern(settings, "alpha_pattern", "lora_alpha", name)) for name in ranks}
    return HyLoRADAConfig(
        method=method,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=float(settings.get("lora_dropout", 0.0)),
        use_rslora=bool(settings.get("use_rslora")),
        target_modules=shortest_targets(list(ranks), names),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha * ranks[name] / rank},
        train_embeddings=trained[0],
        train_norms=trained[1],
    )


def _adapted(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The layers that have an A."""
    return [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]


def _by_pattern(settings: Mapping[str, Any], pattern: str, default: str, name: str) -> Any:
    """What a setting of PEFT's is for one layer, by the rule that PEFT has for its patterns."""
    found = settings.get(pattern) or {}
    return next((v for key, v in found.items() if re.fullmatch(rf"(.*\.)?({key})", name)), settings[default])


def _dora_shapes(model: HyLoRADAModel) -> dict[str, tuple[int, ...]]:
    shapes = layout.tensor_shapes(model.sites)
    gates = set(LEAVES["hylorada_v1"]) - set(LEAVES["dora"])
    return {name: shape for name, shape in shapes.items() if name.rsplit(".", 1)[1] not in gates}


def _of_dtype(model: HyLoRADAModel, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in the dtype of the model's own adapters."""
    own = jax.tree.leaves(model.adapters)[0].dtype
    return {name: tensor.astype(own) for name, tensor in tensors.items()}
