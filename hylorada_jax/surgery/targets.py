"""Which layers of a model are adapted: names, regular expressions, roles, "all-linear".

Imports neither jax nor torch: both packages select their targets here.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import TargetError
from hylorada_jax.models.families import CROSS_ATTENTIONS, HEADS, MLP_OUTPUTS, ROLES, ROUTERS
from hylorada_jax.surgery.patterns import matches
from hylorada_jax.surgery.short_patterns import patterns_of
from hylorada_jax.text import short

ALL_LINEAR = "all-linear"


def select_targets(
    names: Sequence[str], config: HyLoRADAConfig, *, heads: bool = False, others: Sequence[str] = ()
) -> list[str]:
    """The names of the layers to adapt, in the order of ``names``.

    A pattern matches a layer by its full name, by the end of its name after a dot ("q_proj" matches
    "model.layers.0.self_attn.q_proj"), or as a regular expression over the full name. "all-linear"
    matches every linear layer but the output head and a mixture's router.

    Args:
        names: the full names of all linear layers of a model.
        config: its ``target_modules``, ``exclude_modules`` and ``roles`` are read.
        heads: whether what has the name of an output head may be adapted, where it is named.
        others: what the error names where there are no layers: modules that nothing can be attached to.

    Returns:
        The selected names.

    Raises:
        TargetError: there are no layers; a pattern matches nothing, is not a regular expression of bounded
            cost, names the output head, or nothing is left.

    Example:
        >>> names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"]
        >>> select_targets(names, HyLoRADAConfig(target_modules=("c_proj",), exclude_modules=("mlp.c_proj",)))
        ['h.0.attn.c_proj']
    """
    targets = config.roles if config.target_modules is None else config.target_modules
    if targets and not names:
        raise TargetError(
            "A model to adapt has linear layers of a class that is known.",
            "a model without any" + (f"; it has {short(others)}" if others else ""),
            "In Flax, make the class of its linear layers known: register_linear, or register_einsum in NNX.",
        )
    chosen: set[str] = set().union(*_matching(targets, names))
    chosen -= set().union(*_matching(config.exclude_modules, names))
    if not heads and (found := sorted(filter(is_head, chosen))):
        raise TargetError(
            "The output head is not adapted: the loss reads its weight itself, in chunks of the vocabulary.",
            ", ".join(found),
            f"Exclude it: exclude_modules={found}.",
        )
    if targets and not chosen:
        raise TargetError(
            "At least one layer must be left to adapt.",
            f"targets {list(targets)} less exclusions {list(config.exclude_modules)}",
            "Exclude fewer layers.",
        )
    return [name for name in names if name in chosen]


def mlp_outputs(names: Sequence[str]) -> list[str]:
    """The last linear layer of every MLP block: where a sparse adapter acts.

    Args:
        names: the full names of all linear layers of a model.

    Returns:
        The selected names, in their order.

    Raises:
        TargetError: there is none.

    Example:
        >>> mlp_outputs(["h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"])
        ['h.0.mlp.c_proj']
    """
    # BERT's attention ends in an output.dense too.
    found = [
        name
        for name in names
        if _is_one_of(name, MLP_OUTPUTS) and not _is_one_of(name, ROLES["o"]) and not is_cross(name)
    ]
    if not found:
        raise TargetError(
            f"A sparse adapter follows the last linear layer of an MLP block: {', '.join(MLP_OUTPUTS)}.",
            f"linear layers {_endings(names)}",
            "Leave sparse_enabled out for this model.",
        )
    return found


def self_attentions(names: Sequence[str]) -> list[str]:
    """Every self-attention module: the owner of a query projection, cross-attention left out.

    Args:
        names: the full names of all linear layers of a model.

    Returns:
        The modules' names, in the order of their query projections.

    Raises:
        TargetError: there is none.

    Example:
        >>> self_attentions(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"])
        ['h.0.attn']
    """
    owners = [name.rpartition(".")[0] for name in names if _is_one_of(name, ROLES["q"])]
    found = [name for name in owners if not is_cross(name)]
    if not found:
        raise TargetError(
            f"A self-attention has a query projection: {', '.join(ROLES['q'])}.",
            f"linear layers {_endings(names)}",
            "Set daa_enabled and s2_attn_enabled to False for this model; a method may have them on.",
        )
    return found


def is_head(name: str) -> bool:
    """Whether a linear layer is an output head, by its name."""
    return _is_one_of(name, HEADS)


def is_cross(name: str) -> bool:
    """Whether a module is, or is part of, an attention that reads an encoder, by its name."""
    return not {*CROSS_ATTENTIONS}.isdisjoint(name.split("."))


def left_out(names: Iterable[str]) -> list[str]:
    """The linear layers that "all-linear" leaves out: by their names, output heads and routers of experts."""
    return sorted(name for name in names if is_head(name) or _is_one_of(name, ROUTERS))


def layer_index(name: str) -> int | None:
    """The depth of a layer, by its dotted name; None where it has no number.

    Args:
        name: the first part that is a number tells, or else the first that ends in one, as flax names blocks.

    Example:
        >>> [layer_index(name) for name in ("h.3.mlp.c_fc", "Block_3.Dense_1", "lm_head")]
        [3, 3, None]
    """
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()] or re.findall(r"_(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else None


def model_depth(names: Sequence[str], config: HyLoRADAConfig) -> int:
    """The number of a model's layers in depth, 1 where their names have no numbers.

    Args:
        names: the names of all linear layers.
        config: its ``method`` and ``rank_strategy`` are read.

    Raises:
        TargetError: ranks are by depth and no layer has a number.

    Example:
        >>> model_depth(["h.0.c_fc", "h.1.c_fc", "lm_head"], HyLoRADAConfig(rank_strategy="decreasing"))
        2
    """
    depth = max((index for name in names if (index := layer_index(name)) is not None), default=None)
    if config.linear and config.rank_strategy != "uniform" and depth is None:
        raise TargetError(
            f"rank_strategy={config.rank_strategy!r} takes layers with numbers in their names.",
            ", ".join(_endings(names)),
            "Name the blocks as in layers.0, or give ranks by rank_pattern.",
        )
    return 1 if depth is None else depth + 1


def layer_ranks(selected: Sequence[str], names: Sequence[str], config: HyLoRADAConfig) -> dict[str, int]:
    """The rank of every selected layer, by ``rank_pattern`` or else by ``rank_strategy`` (method.md §7).

    Args:
        selected: the names of the adapted layers.
        names: the names of all linear layers, which tell the model's depth.
        config: its ``lora_rank``, ``rank_strategy`` and ``rank_pattern`` are read.

    Returns:
        {name: rank}; a layer outside the numbered blocks has the full rank.

    Raises:
        TargetError: a pattern matches no layer, or ranks are by depth and no layer has a number.
    """
    depth = model_depth(names, config)
    own = by_pattern(config.rank_pattern, names)
    ranks = {}
    for name in selected:
        index = layer_index(name)
        by_depth = config.lora_rank if index is None else config.layer_rank(index, depth)
        ranks[name] = own.get(name, by_depth)
    return ranks


def with_saved_ranks(
    config: HyLoRADAConfig, ranks: Mapping[str, int], names: Sequence[str]
) -> HyLoRADAConfig:
    """The config of an adapter that was saved with these ranks.

    Which numbers in a name tell the depth has changed between versions, and an adapter keeps the ranks that
    it was trained with.

    Args:
        config: the adapter's.
        ranks: by the names of the layers that it adapts.
        names: the names of all linear layers of the model.

    Returns:
        The config; where its ranks by depth are others today, ``rank_pattern`` says all of them. One that has
        no such ranks, or of which they exceed ``lora_rank``, is returned as it is.

    Example:
        >>> names = ["block_0.fc", "block_1.fc"]
        >>> config = HyLoRADAConfig(lora_rank=8, rank_strategy="decreasing")
        >>> config = with_saved_ranks(config, dict.fromkeys(names, 8), names)
        >>> config.rank_strategy, config.rank_pattern
        ('uniform', ())
    """
    if config.rank_strategy == "uniform" or not ranks:
        return config
    own = by_pattern(config.rank_pattern, names)
    if any(not 1 <= rank <= config.lora_rank for name, rank in ranks.items() if name not in own):
        return config
    kept = {name: own.get(name, rank) for name, rank in ranks.items()}
    numbered = any(layer_index(name) is not None for name in names)
    if numbered and layer_ranks(list(kept), names, config) == kept:
        return config
    return dataclasses.replace(
        config, rank_strategy="uniform", rank_pattern=patterns_of(kept, config.lora_rank)
    )


def layer_alphas(
    ranks: Mapping[str, int], names: Sequence[str], config: HyLoRADAConfig, *, strict: bool = True
) -> dict[str, float]:
    """α of every adapted layer: ``alpha_pattern``'s, or in ``lora_alpha``'s ratio to the rank.

    Args:
        ranks: from :func:`layer_ranks`.
        names: the names of all linear layers.
        config: its ``lora_alpha``, ``lora_rank`` and ``alpha_pattern`` are read.
        strict: False where only the adapted layers are known, and a pattern may be of others.

    Returns:
        {name: α}.

    Raises:
        TargetError: a pattern matches no layer.
    """
    own = by_pattern(config.alpha_pattern, names, strict=strict)
    ratio = config.lora_alpha / config.lora_rank
    return {name: own.get(name, ratio * rank) for name, rank in ranks.items()}


def by_pattern(pattern: Any, names: Sequence[str], *, strict: bool = True) -> dict[str, Any]:
    """{name: value} of the layers that a pattern's keys match; a TargetError where one matches none."""
    found: dict[str, Any] = {}
    values = dict(pattern)
    for value, matching in zip(values.values(), _matching(values, names, strict), strict=True):
        found = dict.fromkeys(matching, value) | found  # the first one wins
    return found


def _matching(patterns: Iterable[str], names: Sequence[str], strict: bool = True) -> Iterator[set[str]]:
    for pattern, found in zip(patterns, matches(patterns, names), strict=True):
        if pattern == ALL_LINEAR:
            yield set(names).difference(left_out(names))
            continue
        found |= {name for name in names if _is_one_of(name, ROLES.get(pattern, (pattern,)))}
        if strict and not found:
            raise TargetError(
                "Every target and exclusion must match a linear layer.",
                repr(pattern),
                _suggestion(pattern, names),
            )
        yield found


def _is_one_of(name: str, endings: Iterable[str]) -> bool:
    return any(f".{name}".endswith("." + ending) for ending in endings)


def _endings(names: Sequence[str]) -> list[str]:
    # Layers that differ only in their depth are one.
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    endings = _endings(names)
    lasts = {ending.rsplit(".", 1)[-1] for ending in endings}
    near = difflib.get_close_matches(pattern, sorted({*lasts, *endings}), n=5, cutoff=0.5)
    return (
        f"Near matches: {', '.join(near)}. " if near else ""
    ) + f"The model's linear layers: {', '.join(endings)}."
