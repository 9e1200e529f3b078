"""An adapter that PEFT has saved, to go on from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io.adapter_files import check_keys, short
from hylorada_jax.io.peft_files import TOKEN_EMBEDDINGS, read_peft, tied_head
from hylorada_jax.math.linear_adapter import LEAVES
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.face import BaseModel, as_base
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.collapse import expand
from hylorada_jax.surgery.layout import tensor_name
from hylorada_jax.surgery.modules import find_modules
from hylorada_jax.surgery.targets import shortest_targets


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
    tensors, config = check_import(tensors, settings, as_base(base_model), method)
    model = HyLoRADAModel(base_model, config)
    if config.method == "hylorada_v1":
        check_keys({name: tensor.shape for name, tensor in tensors.items()}, _dora_shapes(model))
        tensors = tensors | expand(model.sites, tensors, model.base.params, model.frozen["constants"], config)
    model.adapters = layout.unflatten(model.sites, _of_dtype(model, tensors))
    return model


def check_import(
    tensors: dict[str, np.ndarray], settings: Mapping[str, Any], base: BaseModel, method: str | None
) -> tuple[dict[str, np.ndarray], HyLoRADAConfig]:
    """The tensors of an adapter that are ours to read, and its config, checked as far as shapes tell.

    Args:
        tensors: from :func:`hylorada_jax.io.peft_files.read_peft`.
        settings: likewise.
        base: the base model; its weights are not looked at.
        method: as for :func:`import_peft`.

    Raises:
        CheckpointError: the files fit another model.
        ConfigError: the adapter uses what this library does not have, or cannot start that method.
    """
    tensors = _without_tied_head(tensors, base.config)
    return tensors, _config(tensors, settings, base, method)


def _config(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], base: BaseModel, method: str | None
) -> HyLoRADAConfig:
    """Our config of what PEFT's file holds: the layers that its tensors name, each with its rank and α."""
    theirs = "dora" if settings.get("use_dora") else "lora"
    if (method or theirs) not in ({"lora"} if theirs == "lora" else {"dora", "hylorada_v1"}):
        raise ConfigError(
            "LoRA goes on as lora, DoRA as dora or hylorada_v1",
            f"method={method!r} for an adapter of {theirs}",
            "Choose one of these.",
        )
    modules = find_modules(base.init_params)
    names, ranks = modules.linear_names, {}
    for name in (key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")):
        ranks[name] = len(tensors[f"{name}.lora_A"])
    stated = {name: _by_pattern(settings, "rank_pattern", "r", name) for name in ranks}
    if alien := sorted(set(ranks) - set(names)):
        raise CheckpointError(
            "The adapter's layers must be linear layers of the model, its output head excepted",
            f"{short(alien)}; the model has {short(names)}",
            "Load the base model that the adapter was trained on.",
        )
    if wrong := [f"{name}: {ranks[name]}, not {r}" for name, r in stated.items() if r != ranks[name]]:
        raise CheckpointError(
            "The tensors must have the ranks of their config", short(wrong), "Save it again."
        )
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    alphas = {name: float(_by_pattern(settings, "alpha_pattern", "lora_alpha", name)) for name in ranks}
    unfrozen = {
        f"train_{group}": {
            tensor_name(name, leaf) for m in holders for name in m.names for leaf, _ in m.shapes
        }
        for group, holders in (("embeddings", modules.embeddings), ("norms", modules.norms))
    }
    whole = {name for name in tensors if name.rsplit(".", 1)[1] not in LEAVES["dora"]}
    trained = {setting: bool(group & whole) for setting, group in unfrozen.items()}
    if odd := whole ^ set().union(*(group for setting, group in unfrozen.items() if trained[setting])):
        raise ConfigError(
            "modules_to_save can be all embeddings, all norms, both or none",
            f"{short(sorted(whole))}; this model's that differ: {short(sorted(odd))}",
            "Train the adapter without, or with all of a kind.",
        )
    return HyLoRADAConfig(
        method=method or theirs,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=float(settings.get("lora_dropout", 0.0)),
        use_rslora=bool(settings.get("use_rslora")),
        target_modules=shortest_targets(list(ranks), names),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha * ranks[name] / rank},
        train_embeddings=trained["train_embeddings"],
        train_norms=trained["train_norms"],
    )


def _without_tied_head(tensors: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """A tied head is the embedding again. PEFT unties the two where one of them alone is trained."""
    head = tied_head(config.model_type)
    rest = {name: tensor for name, tensor in tensors.items() if name != head}
    embeddings = {name: tensor for name, tensor in rest.items() if name.split(".")[-2] in TOKEN_EMBEDDINGS}
    if not config.tie_word_embeddings or (head not in tensors and not embeddings):
        return tensors
    twin = tensors.get(head)
    if twin is None or not any(np.array_equal(tensor, twin) for tensor in embeddings.values()):
        untouched = f"{head} is {'another' if head in tensors else 'untouched'}"
        raise ConfigError(
            "The head of this model is its embedding: both are trained, or none",
            f"{', '.join(embeddings) or 'no embedding'}; {untouched}",
            "Train both or none, with the same numbers.",
        )
    return rest


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
