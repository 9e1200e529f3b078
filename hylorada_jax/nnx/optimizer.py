"""LoRA+ and the parameter groups for the adapters of an NNX model."""

from typing import Any

import jax
import optax
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.leaves import leaf_of
from hylorada_jax.nnx.adapting import known_adaptation
from hylorada_jax.nnx.variables import AdapterParam
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import optimizer_of, peak_rates


def make_optimizer(
    model: nnx.Module, training: TrainingConfig, config: HyLoRADAConfig | None = None
) -> optax.GradientTransformation:
    """AdamW for each group of adapter leaves, after clipping by the global norm: the trainer's own.

    Args:
        model: an adapted model, or one with layers of this package in it.
        training: rates, decay, schedule and clipping.
        config: LoRA+; None takes that of :func:`adapt`, which was called with the model or its parts.

    Returns:
        The transformation for ``nnx.Optimizer(model, tx, wrt=AdapterParam)``.

    Raises:
        ConfigError: there is nothing to train, a leaf that belongs to no group, epochs in place of steps, or
            parts whose configs have different rates. Where the transformation is given anything but the
            adapter's leaves, it raises one too.

    Example:
        >>> from hylorada_jax.nnx import LoRALinear
        >>> model = LoRALinear(3, 4, rank=2, rngs=nnx.Rngs(0))
        >>> config = HyLoRADAConfig(method="lora", lora_plus_enabled=True)
        >>> tx = make_optimizer(model, TrainingConfig(output="runs/nnx", steps=10), config)
        >>> optimizer = nnx.Optimizer(model, tx, wrt=AdapterParam)

    Source: method.md §7; LoRA+: Hayou et al. 2024.
    """
    state = nnx.state(model, AdapterParam, graph=True)
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if not found:
        raise ConfigError(
            "An optimizer trains an adapter's leaves, of hylorada_jax.nnx.AdapterParam.",
            f"{type(model).__name__} without any",
            "Call hylorada_jax.nnx.adapt(model, config, rngs) first.",
        )
    config = _config_of(model, training) if config is None else config
    tx = optimizer_of([_group(path, variable) for path, variable in found], training, config)

    # In a list of arrays the groups are the same, whether nnx gives variables or their values.
    def init(params: Any) -> Any:
        leaves = jax.tree.leaves(params)
        if len(leaves) != len(found):
            raise ConfigError(
                "The optimizer of an adapter is given the adapter's leaves, of AdapterParam, and no others.",
                f"{len(leaves)} arrays, where the adapter has {len(found)}",
                "Make it by nnx.Optimizer(model, tx, wrt=AdapterParam).",
            )
        return tx.init(leaves)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(gradients)
        updates, state = tx.update(leaves, state, jax.tree.leaves(params))
        return jax.tree.unflatten(structure, updates), state

    return optax.GradientTransformation(init, update)


def _config_of(model: Any, training: TrainingConfig) -> HyLoRADAConfig:
    """That of the model, or of its parts where they were adapted one by one."""
    modules = (module for _, module in nnx.iter_modules(model, graph=True))
    adapted = [found.config for module in modules if (found := known_adaptation(module)) is not None]
    by_rates = {tuple(peak_rates(training, config).items()): config for config in adapted}
    if len(by_rates) > 1:
        raise ConfigError(
            "Parts of a model that are trained together have the same rates.",
            " and ".join(str(dict(rates)) for rates in by_rates),
            "Give make_optimizer the config to go by.",
        )
    return next(iter(by_rates.values()), HyLoRADAConfig())


def _group(path: tuple[Any, ...], variable: nnx.Variable) -> str:
    try:
        return leaf_of(variable.get_metadata("component"), str(path[-1].key)).group
    except KeyError as error:
        raise ConfigError(
            "Every trainable leaf belongs to a group.",
            "/".join(str(key.key) for key in path),
            "Train it by an optimizer of your own.",
        ) from error
