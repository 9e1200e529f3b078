"""An adapter that PEFT has saved, to go on from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io.adapter_files import check_keys, digest, short
from hylorada_jax.io.peft_files import MERGE, read_peft
from hylorada_jax.io.peft_whole import settle_whole
from hylorada_jax.leaves import KINDS
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.face import BaseModel, as_base
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.collapse import expand
from hylorada_jax.surgery.modules import Modules, find_modules
from hylorada_jax.surgery.patterns import matches
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
        TargetError: a key of its patterns is no regular expression of bounded cost.

    Example:
        model = import_peft(load_model("smollm2-135m"), "runs/peft", method="hylorada_v1")

    Source: method.md §1, Collapse, solved for the magnitude.
    """
    tensors, settings = read_peft(directory)
    base = as_base(base_model)
    modules = check_import(tensors, settings, base, method)
    tensors, trained = settle_whole(tensors, settings, base, modules)
    config = _config(tensors, settings, modules.linear_names, method or _theirs(settings), trained)
    model = HyLoRADAModel(base_model, config)
    if config.method == "hylorada_v1":
        check_keys({name: tensor.shape for name, tensor in tensors.items()}, _dora_shapes(model))
        tensors = tensors | expand(model.sites, tensors, model.base.params, model.frozen["constants"], config)
    model.adapters = layout.unflatten(model.sites, _of_dtype(model, tensors))
    model.start = digest(tensors)
    return model


def check_import(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], base: BaseModel, method: str | None
) -> Modules:
    """Checks an adapter as far as shapes tell: its layers, their ranks, and the method that goes on from it.

    Args:
        tensors: from :func:`hylorada_jax.io.peft_files.read_peft`.
        settings: likewise.
        base: the base model, which may be without its weights.
        method: as for :func:`import_peft`.

    Returns:
        The base model's modules.

    Raises:
        CheckpointError: the files fit another model.
        ConfigError: the adapter uses what this library does not have, or cannot start that method.
    """
    theirs = _theirs(settings)
    if (method or theirs) not in ({"lora"} if theirs == "lora" else {"dora", "hylorada_v1"}):
        raise ConfigError(
            "LoRA goes on as lora, DoRA as dora or hylorada_v1",
            f"method={method!r} for an adapter of {theirs}",
            "Choose one of these.",
        )
    ranks = _ranks(tensors)
    if heads := [name for name in ranks if is_head(name)]:
        raise ConfigError(
            "An output head is not adapted here", short(heads), f"{MERGE} A tied head: train one without it."
        )
    modules = find_modules(base.init_params)
    if alien := sorted(set(ranks) - set(modules.linear_names)):
        raise CheckpointError(
            "The adapter's layers must be linear layers of the model",
            f"{short(alien)}; the model has {short(modules.linear_names)}",
            "Load the base model that the adapter was trained on.",
        )
    stated = _by_pattern(settings, "rank_pattern", "r", [*ranks])
    if wrong := [f"{name}: {ranks[name]}, not {r}" for name, r in stated.items() if r != ranks[name]]:
        raise CheckpointError(
            "The tensors must have the ranks of their config", short(wrong), "Save it again."
        )
    return modules


def _theirs(settings: Mapping[str, Any]) -> str:
    return "dora" if settings.get("use_dora") else "lora"


def _ranks(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The layers that have an A, and its rank."""
    return {name.removesuffix(".lora_A"): len(A) for name, A in tensors.items() if name.endswith(".lora_A")}


def _config(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    names: list[str],
    method: str,
    trained: tuple[bool, bool],
) -> HyLoRADAConfig:
    """Our config of what PEFT's file holds: the layers that its tensors name, each with its rank and α."""
    ranks = _ranks(tensors)
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    alphas = _by_pattern(settings, "alpha_pattern", "lora_alpha", [*ranks])
    return HyLoRADAConfig(
        method=method,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=float(settings.get("lora_dropout", 0.0)),
        use_rslora=bool(settings.get("use_rslora")),
        target_modules=shortest_targets(list(ranks), names),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: float(a) for name, a in alphas.items() if a != alpha * ranks[name] / rank},
        train_embeddings=trained[0],
        train_norms=trained[1],
    )


def _by_pattern(
    settings: Mapping[str, Any], pattern: str, default: str, names: Sequence[str]
) -> dict[str, Any]:
    """{name: what a setting of PEFT's is for that layer}, by the rule that PEFT has for its patterns."""
    found = settings.get(pattern) or {}
    values: dict[str, Any] = {}
    for value, matching in zip(found.values(), matches(found, names, endings=True), strict=True):
        values = dict.fromkeys(matching, value) | values  # the first one wins
    return dict.fromkeys(names, settings[default]) | values


def _dora_shapes(model: HyLoRADAModel) -> dict[str, tuple[int, ...]]:
    shapes = layout.tensor_shapes(model.sites)
    gates = set(KINDS["hylorada_v1"]) - set(KINDS["dora"])
    return {name: shape for name, shape in shapes.items() if name.rsplit(".", 1)[1] not in gates}


def _of_dtype(model: HyLoRADAModel, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in the dtype of the model's own adapters."""
    own = jax.tree.leaves(model.adapters)[0].dtype
    return {name: tensor.astype(own) for name, tensor in tensors.items()}
