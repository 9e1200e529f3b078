"""An adapter that PEFT has saved, to go on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.exchange.peft_files import MERGE, SavedPeft, open_peft
from hylorada_jax.exchange.peft_whole import check_whole, is_whole, settle_whole
from hylorada_jax.math.linear_adapter import leaf_shapes
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.collapse import expand
from hylorada_jax.surgery.layout import check_keys
from hylorada_jax.surgery.modules import Modules, modules_of
from hylorada_jax.surgery.patterns import matches
from hylorada_jax.surgery.short_patterns import patterns_of
from hylorada_jax.surgery.targets import is_head
from hylorada_jax.text import short


def import_peft(
    base_model: Any, directory: str | Path | SavedPeft, *, method: str | None = None
) -> HyLoRADAModel:
    """A model that carries an adapter PEFT has saved, and goes on training from there.

    DoRA's dropout, where the file has one, then acts before A alone; PEFT's acts before the frozen layer too.

    Args:
        base_model: the model it was trained on, as for :class:`HyLoRADAModel`.
        directory: holds PEFT's adapter_config.json and adapter_model.safetensors; or what
            :func:`hylorada_jax.exchange.peft_files.open_peft` gave of it.
        method: lora or dora, as the file has it, when None; a DoRA adapter can also start ``hylorada_v1``,
            whose magnitude is set so that at its ordinary gates it computes the same.

    Returns:
        The adapted model, in the dtype of its base.

    Raises:
        CheckpointError: the files are damaged, or fit another model.
        ConfigError: the adapter uses what this library does not have, or cannot start that method.
        TargetError: a key of its patterns is not a regular expression of bounded cost.

    Example:
        model = import_peft(load_model("smollm2-135m"), "runs/peft", method="hylorada_v1")

    Source: method.md §1, Collapse, solved for the magnitude.
    """
    saved = directory if isinstance(directory, SavedPeft) else open_peft(directory)
    base = as_base(base_model)
    settings, modules = saved.settings, check_import(saved, base, method)
    tensors, trained = settle_whole(saved.tensors(), settings, base, modules)
    config = _config(saved, modules.linear_names, method or _theirs(settings), trained)
    model = HyLoRADAModel(base, config)
    if config.method == "hylorada_v1":
        tensors = tensors | expand(model.sites, tensors, model.base.params, model.frozen["constants"], config)
    model.adapters = layout.unflatten(model.sites, _of_dtype(model, tensors))
    model.chat_template = saved.chat_template
    return model


def check_import(saved: SavedPeft, base: BaseModel, method: str | None) -> Modules:
    """Checks an adapter before its tensors are read: layers, shapes, and the method that goes on from it.

    Args:
        saved: from :func:`hylorada_jax.exchange.peft_files.open_peft`.
        base: the base model, which may be without its weights.
        method: as for :func:`import_peft`.

    Returns:
        The base model's modules.

    Raises:
        CheckpointError: the files fit another model.
        ConfigError: the adapter uses what this library does not have, or cannot start that method.
    """
    theirs = _theirs(saved.settings)
    if (method or theirs) not in ({"lora"} if theirs == "lora" else {"dora", "hylorada_v1"}):
        raise ConfigError(
            "LoRA goes on as lora, DoRA as dora or hylorada_v1.",
            f"method={method!r} for an adapter of {theirs}",
            "Choose one of these.",
        )
    ranks = _ranks(saved.shapes)
    if heads := [name for name in ranks if is_head(name)]:
        raise ConfigError(
            "An output head is not adapted here.", short(heads), f"{MERGE} A tied head: train one without it."
        )
    modules = modules_of(base)
    if alien := sorted(set(ranks) - set(modules.linear_names)):
        raise CheckpointError(
            "The adapter's layers must be linear layers of the model.",
            f"{short(alien)}; the model has {short(modules.linear_names)}",
            "Load the base model that the adapter was trained on.",
        )
    stated = _by_pattern(saved, "rank_pattern", "r")
    if wrong := [f"{name}: {ranks[name]}, not {r}" for name, r in stated.items() if r != ranks[name]]:
        raise CheckpointError(
            "The tensors must have the ranks of their config.", short(wrong), "Save it again."
        )
    sizes = {name: (module.d_in, module.d_out) for module in modules.linears for name in module.names}
    wanted = {
        f"{name}.{leaf}": shape
        for name, rank in ranks.items()
        for leaf, shape in leaf_shapes(theirs, rank, *sizes[name]).items()
    }
    whole = {name: shape for name, shape in saved.shapes.items() if is_whole(name)}
    check_keys({name: saved.shapes[name] for name in saved.shapes.keys() - whole.keys()}, wanted)
    check_whole(whole, base, modules)
    if not ranks:
        raise CheckpointError(
            "An adapter of PEFT has a lora_A for every adapted layer.",
            f"none in {saved.path}",
            "Save it again; of a model that is cut over devices (FSDP, ZeRO-3), gather its parameters first.",
        )
    return modules


def _theirs(settings: Mapping[str, Any]) -> Literal["lora", "dora"]:
    return "dora" if settings["use_dora"] else "lora"


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The layers that have an A, and its rank."""
    As = {name: shape for name, shape in shapes.items() if name.endswith(".lora_A")}
    return {name.removesuffix(".lora_A"): shape[0] if shape else 0 for name, shape in As.items()}


def _config(
    saved: SavedPeft,
    names: list[str],
    method: str,
    trained: tuple[bool, bool],
) -> HyLoRADAConfig:
    """Our config of what PEFT's file holds: the layers that its tensors name, each with its rank and α."""
    ranks, settings = _ranks(saved.shapes), saved.settings
    rank, alpha = settings["r"], settings["lora_alpha"]
    alphas = _by_pattern(saved, "alpha_pattern", "lora_alpha")
    # What no pattern says follows from the rank: those that are so have the value of none.
    own = {name: None if a == alpha * ranks[name] / rank else float(a) for name, a in alphas.items()}
    return HyLoRADAConfig(
        method=method,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=settings["lora_dropout"],
        use_rslora=settings["use_rslora"],
        target_modules=tuple(patterns_of({name: name in ranks for name in names}, False)),
        rank_pattern=patterns_of(ranks, rank),
        alpha_pattern=patterns_of(own, None),
        train_embeddings=trained[0],
        train_norms=trained[1],
    )


def _by_pattern(saved: SavedPeft, pattern: str, default: str) -> dict[str, Any]:
    """{name: what a setting of PEFT's is for that layer}, by the rule that PEFT has for its patterns."""
    found, theirs = saved.settings.get(pattern) or {}, saved.layers
    values: dict[str, Any] = {}
    for value, matching in zip(found.values(), matches(found, [*theirs.values()], endings=True), strict=True):
        values = dict.fromkeys(matching, value) | values  # the first one wins
    return {name: values.get(own, saved.settings[default]) for name, own in theirs.items()}


def _of_dtype(model: HyLoRADAModel, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in the dtype of the model's own adapters."""
    own = jax.tree.leaves(model.adapters)[0].dtype
    return {name: tensor.astype(own) for name, tensor in tensors.items()}
