"""A trained adapter as PEFT's LoRA or DoRA."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.exchange.peft_card import CARD_NAME, card
from hylorada_jax.exchange.peft_files import tied_head, write_peft
from hylorada_jax.leaves import Part, collapsed_kind
from hylorada_jax.math.quantized import dtype_name
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.chat_template import TEMPLATE_NAME
from hylorada_jax.models.families import TOKEN_EMBEDDINGS, family_of
from hylorada_jax.models.text_part import INSIDE, names_in_peft
from hylorada_jax.placement.processes import is_first
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.collapse import collapse, vanishing_layers, without
from hylorada_jax.surgery.merge import live_parts
from hylorada_jax.surgery.modules import subtree
from hylorada_jax.surgery.plan import Site
from hylorada_jax.surgery.short_patterns import patterns_of, shortest_targets
from hylorada_jax.surgery.targets import layer_alphas
from hylorada_jax.text import short


def export_peft(
    model: HyLoRADAModel,
    directory: str | Path,
    *,
    drop: Collection[str] = (),
    sample: Any = None,
) -> None:
    """Writes an adapter as PEFT's LoRA or DoRA, which computes the same without this library.

        magnitude in the file = c ⊙ n = (1−β)·m + β·n

    LoRA goes as LoRA, DoRA and HyLoRADA as DoRA of that magnitude. Trained embeddings and norms
    become modules_to_save. The text part of a multimodal model keeps its names in the whole model. Where the
    base is quantised, a README.md says how to load it; a chat template of the adapter's own goes into
    chat_template.jinja. Of several processes all must call it, and the first writes.

    Args:
        model: carries the adapter.
        directory: for adapter_config.json and adapter_model.safetensors; made if it does not exist.
        drop: components to leave out although they have an effect: position_bias, structure, daa, sparse.
        sample: token ids [batch, seq]; an error then says what the logits would lose.

    Raises:
        ModelError: what the adapter does is no LoRA and no DoRA; the component is named. Or PEFT's DoRA would
            divide by zero, for a row of W + s·B A is zero; the layers are named.
        ConfigError: ``drop`` names no component.
        CheckpointError: an adapter, or one of the other files, is already there.

    Example:
        model = HyLoRADAModel.from_pretrained(load_model("smollm2-135m"), "runs/finetune/adapter")
        export_peft(model, "runs/peft")

    Source: method.md §1, Collapse; Liu et al. 2024 (DoRA).
    """

    def share(component: str) -> str:
        return f"; dropping it changes the logits by {effect(model, component, sample):.2%}"

    tensors = check_export(
        model.sites,
        layout.flatten(model.sites, model.adapters),
        model.config,
        model.base,
        drop,
        share=None if sample is None else share,
    )
    linear = [site for site in model.sites if site.component == "linear"]
    adapter = (model.sites, tensors, model.base.params, model.frozen["constants"])
    if _is_dora(model.config):
        _refuse_vanishing(vanishing_layers(*adapter))
    made = collapse(*adapter)
    unfrozen = layout.tensor_shapes([site for site in model.sites if site.component == "unfrozen"])
    whole = {name: tensors[name] for name in unfrozen}
    if model.config.train_embeddings and model.base.config.tie_word_embeddings:
        # PEFT gives a trained embedding a copy of its own, and so leaves the head as it was: said twice.
        embedding = next(name for name in whole if name.split(".")[-2] in TOKEN_EMBEDDINGS)
        whole[tied_head(model.base.config.model_type)] = whole[embedding]
    settings, theirs = _settings(model, linear, list(whole)), names_in_peft(model.base.inside)
    named = {theirs(name): value for name, value in (made | whole).items()}
    beside = {CARD_NAME: _card(model.base), TEMPLATE_NAME: model.chat_template}
    if is_first():
        write_peft(directory, named, settings, {name: text for name, text in beside.items() if text})


def effect(model: HyLoRADAModel, component: str, input_ids: Any) -> float:
    """How much the logits change when a component is dropped: ‖logits without − logits‖ / ‖logits‖.

    Args:
        model: carries the adapter.
        component: position_bias, structure, daa or sparse.
        input_ids: int [batch, seq].
    """
    tensors = layout.flatten(model.sites, model.adapters)
    dropped = layout.unflatten(model.sites, without(model.sites, tensors, [component]))
    run = jax.jit(model.apply)
    whole, rest = (
        np.asarray(run(adapters, jnp.asarray(input_ids), frozen=model.frozen).logits, np.float64)
        for adapters in (model.adapters, dropped)
    )
    return float(np.linalg.norm(rest - whole) / np.linalg.norm(whole))


def check_export(
    sites: Sequence[Site],
    tensors: Mapping[str, np.ndarray],
    config: HyLoRADAConfig,
    base: BaseModel,
    drop: Collection[str] = (),
    share: Callable[[str], str] | None = None,
) -> dict[str, np.ndarray]:
    """Refuses what PEFT's files cannot carry.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        tensors: as an adapter file holds them.
        config: the adapter's.
        base: the base model, perhaps without its weights.
        drop: as for :func:`export_peft`.
        share: what a refusal adds about a component.

    Returns:
        The tensors that are left.

    Raises:
        ModelError: what the adapter does is no LoRA and no DoRA; the component is named.
        ConfigError: ``drop`` names no component.
    """
    left = without(sites, tensors, drop)
    _refuse_inexpressible(sites, config, base, live_parts(sites, left), share)
    return left


def _refuse_inexpressible(
    sites: Sequence[Site],
    config: HyLoRADAConfig,
    base: BaseModel,
    live: Mapping[Part, str],
    share: Callable[[str], str] | None,
) -> None:
    if not any(site.component == "linear" for site in sites):
        raise ModelError(
            "PEFT's files carry adapters of linear layers.",
            f"method={config.method!r}, which adapts none",
            "Keep the adapter beside the model.",
        )
    biased = [
        name
        for site in sites
        if site.component == "linear" and config.magnitude_scales_bias and _is_dora(config)
        if "bias" in subtree(base.params, site.module.path)
        for name in site.names
    ]
    if biased:
        raise ModelError(
            "DoRA in PEFT scales no bias.",
            f"magnitude_scales_bias=True, and biases in {short(biased)}",
            "Merge the adapter instead: `hylorada merge`.",
        )
    # Of other models several modules share the table, of which PEFT trains one, or the head has a bias.
    family = family_of(base.config.model_type)
    if config.train_embeddings and family.task != "CAUSAL_LM":
        raise ModelError(
            "Trained embeddings go to PEFT for causal language models.",
            f"train_embeddings=True for model_type {family.model_type!r}",
            "Merge the adapter instead: `hylorada merge`.",
        )
    if not live:
        return
    parts = [f"{component}: {found}{share(component) if share else ''}" for component, found in live.items()]
    raise ModelError(
        "PEFT's LoRA and DoRA are updates of weights, the same for every token.",
        "\n            ".join(parts),
        f"Drop it deliberately: drop={list(live)}, on the command line --drop {' '.join(live)}; or train "
        "without.",
    )


def _refuse_vanishing(layers: list[str]) -> None:
    if layers:
        raise ModelError(
            "DoRA in PEFT divides by ‖W + s·B A‖ of every row, so that a row of zeros gives NaN.",
            f"rows of zeros in {short(layers)}",
            "Merge the adapter instead: `hylorada merge`.",
        )


def _settings(model: HyLoRADAModel, linear: list[Site], whole: list[str]) -> dict[str, Any]:
    """What PEFT's LoraConfig is made from."""
    config, kinds = model.config, {site.linear.kernel_is_out_in for site in linear}
    theirs = names_in_peft(model.base.inside)
    own = {name: rank for site in linear for name, rank in zip(site.names, site.ranks, strict=True)}
    ranks = {theirs(name): rank for name, rank in own.items()}
    found = layer_alphas(own, model.linear_names, config)
    alphas = {theirs(name): _alpha(alpha, config) for name, alpha in found.items()}
    return {
        "peft_type": "LORA",
        "task_type": family_of(model.base.config.model_type).task,
        "base_model_name_or_path": model.base.name,
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": _plain(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": _targets(list(ranks), [*map(theirs, model.linear_names)], model.base.inside),
        "rank_pattern": patterns_of(ranks, config.lora_rank),
        "alpha_pattern": patterns_of(alphas, _plain(config.lora_alpha)),
        "use_rslora": config.use_rslora,
        "use_dora": _is_dora(config),
        # torch's Conv1D has its weight [d_in, d_out]; Flax's, whose kernel is [d_out, d_in], is its port.
        "fan_in_fan_out": kinds == {True},
        "bias": "none",
        "modules_to_save": sorted({theirs(name.rpartition(".")[0]) for name in whole}) or None,
    }


def _card(base: BaseModel) -> str | None:
    """What a user of PEFT must know of a base that is quantised."""
    dtype = dtype_name(base.params)
    return card(base.name, dtype) if "+" in dtype else None


def _targets(chosen: list[str], names: list[str], inside: bool) -> list[str] | str:
    """What PEFT finds the adapted layers by: endings, or for one part of a model a regular expression."""
    endings = shortest_targets(chosen, names)
    if not inside:
        return list(endings)
    return rf"(?={re.escape(INSIDE)}\.)(.*\.)?({'|'.join(map(re.escape, endings))})"


def _is_dora(config: HyLoRADAConfig) -> bool:
    return config.linear is not None and collapsed_kind(config.linear) == "dora"


def _alpha(found: float, config: HyLoRADAConfig) -> float | int:
    """α as it was set: in its ratio to the rank it is that to rounding."""
    return _plain(config.lora_alpha if math.isclose(found, config.lora_alpha, rel_tol=1e-12) else found)


def _plain(number: float) -> float | int:
    """Whole numbers as PEFT writes them."""
    return int(number) if float(number).is_integer() else number
