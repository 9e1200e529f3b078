"""LoRA+ and the parameter groups: which leaf learns at which rate, and which leaves decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hylorada_jax import leaves
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.trees import Adapters


class Group(NamedTuple):
    """A row of the table in method.md, section 7: its own peak rate or None for the run's, and decay."""

    rate: float | None = None
    decays: bool = False


GROUPS: dict[leaves.Group, Group] = {
    "lora_A": Group(decays=True),
    "lora_B": Group(decays=True),  # at the run's rate times lora_plus_ratio
    "magnitude": Group(),
    "gate": Group(),
    "daa": Group(rate=1e-3),
    "sparse": Group(rate=2e-4, decays=True),
    "sparse_gate": Group(rate=2e-4),
    "unfrozen": Group(decays=True),
    "unfrozen_norm": Group(),
}


def label_tree(adapters: Adapters) -> Any:
    """The group of every trainable leaf.

    Args:
        adapters: the trainable tree, nested dicts.

    Returns:
        A congruent tree of names in ``GROUPS``.

    Raises:
        ConfigError: a leaf belongs to no group; its path is named.

    Example:
        >>> label_tree({"q_proj": {"lora_A": 0.0, "magnitude_gate": 0.0}, "position_bias": 0.0})
        {'position_bias': 'gate', 'q_proj': {'lora_A': 'lora_A', 'magnitude_gate': 'gate'}}

    Source: method.md, section 7.
    """

    def label(path: tuple[Any, ...], _: object) -> str:
        names = [str(key.key) for key in path]
        if (found := leaves.leaf_at(tuple(names))) is None:
            raise ConfigError(
                "Every trainable leaf belongs to a group.",
                "/".join(names),
                "Add the leaf to the table in hylorada_jax/leaves.py.",
            )
        return found.group

    return jax.tree_util.tree_map_with_path(label, adapters)


def schedule(config: TrainingConfig) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """Linear warm-up, then what ``config.schedule`` names, as a part of the peak rate.

        f(t) = t / w                   for t < w
               p = (T - t) / (T - w)   linear
               (1 - cos(π p)) / 2      cosine
               1                       constant

    Args:
        config: ``steps`` is T, ``rising_steps`` is w.

    Returns:
        f, from the number of steps done to the factor on every peak rate.

    Raises:
        ConfigError: there are epochs in place of steps.

    Source: Devlin et al. 2019 (BERT), appendix A.2; Loshchilov and Hutter 2017 (SGDR), equation 5.
    """
    total, warmup = config.counted_steps(), config.rising_steps

    def factor(step: Int[Array, ""] | int) -> Float[Array, ""]:
        # jax divides int32 in float32 also where float64 is in use.
        step = jnp.asarray(step, jnp.result_type(float))
        rising = step / max(warmup, 1)
        left = jnp.clip((total - step) / max(total - warmup, 1), 0, 1)
        match config.schedule:
            case "linear":
                then = left
            case "cosine":
                then = (1 - jnp.cos(jnp.pi * left)) / 2
            case "constant":
                then = jnp.ones_like(left)
            case _:
                assert_never(config.schedule)
        return jnp.where(step < warmup, rising, then)

    return factor


def peak_rates(training: TrainingConfig, config: HyLoRADAConfig) -> dict[leaves.Group, float]:
    """The peak learning rate of each group.

    Args:
        training: ``learning_rate`` is read.
        config: LoRA+ is read, and for a rate that was not given what is trained of the base.

    Returns:
        A rate for every name in ``GROUPS``.

    Source: method.md, section 7; the ratio is LoRA+, Hayou et al. 2024.
    """
    rate = training.rate_for(config)
    rates = {label: group.rate or rate for label, group in GROUPS.items()}
    if config.lora_plus_enabled:
        rates["lora_B"] *= config.lora_plus_ratio
    return rates


def reported_rate(adapters: Adapters, training: TrainingConfig, config: HyLoRADAConfig) -> float:
    """The peak rate by which a run is known: its own, or where no leaf has that, the greatest that one has.

    Args:
        adapters: the trainable tree.
        training: as in :func:`peak_rates`.
        config: as in :func:`peak_rates`.
    """
    rate = training.rate_for(config)
    rates = {GROUPS[label].rate or rate for label in jax.tree.leaves(label_tree(adapters))}
    return rate if rate in rates else max(rates)


def make_optimizer(
    adapters: Adapters, training: TrainingConfig, config: HyLoRADAConfig
) -> optax.GradientTransformation:
    """AdamW per group, after clipping by the global norm over all leaves.

    Args:
        adapters: the trainable tree; its leaf names decide the groups.
        training: rates, decay, schedule and clipping.
        config: LoRA+.

    Returns:
        The optax transformation. Peak rates and decays are a part of its state, not of the compiled program:
        runs that differ in them alone share one.

    Raises:
        ConfigError: a leaf belongs to no group.

    Source: method.md, section 7; AdamW is Loshchilov and Hutter 2019, with β = (0.9, 0.999) and ε = 1e-8.
    """
    return optimizer_of(label_tree(adapters), training, config)


def optimizer_of(
    labels: Any, training: TrainingConfig, config: HyLoRADAConfig
) -> optax.GradientTransformation:
    """As :func:`make_optimizer`, of a tree whose leaves' groups are known: ``labels``, congruent with it."""
    factor = schedule(training)

    @optax.inject_hyperparams
    def adamw(peak: Any, weight_decay: Any) -> optax.GradientTransformation:
        return optax.adamw(lambda step: peak * factor(step), weight_decay=weight_decay)

    present = set(jax.tree.leaves(labels))
    groups = {
        label: adamw(peak, training.weight_decay if GROUPS[label].decays else 0.0)
        for label, peak in peak_rates(training, config).items()
        if label in present
    }
    return optax.chain(
        optax.clip_by_global_norm(training.max_grad_norm), optax.multi_transform(groups, labels)
    )
