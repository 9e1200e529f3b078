"""LoRA+ and the parameter groups: which leaf learns at which rate, and which leaves decay."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig
from hylorada_torch.settings import rising_steps


class Group(NamedTuple):
    """A row of the table in method.md §7: its own peak rate, or None for the run's; and whether it decays."""

    rate: float | None = None
    decays: bool = False


GROUPS = {
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
# What serves the whole model stands at the top, and goes by its place.
LABEL_OF_PLACE = {"position_bias": "gate", "structure_encoder": "gate"}
LABEL_OF_LEAF = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "magnitude": "magnitude",
    "magnitude_gate": "gate",
    "residual_weight": "gate",
    "position_scale": "gate",
    "scale_from_structure": "gate",
    "alpha": "daa",
    "beta": "daa",
    "position_bias": "daa",
    "down": "sparse",
    "up": "sparse",
    "gate_scores": "sparse_gate",
}


def label(name: str, parameter: nn.Parameter) -> str:
    """The group of a trainable parameter, by its place and the last part of its name.

    An unfrozen ``weight`` is an embedding's if it is a matrix, and a norm's if it is a vector.

    Args:
        name: as `HyLoRADAModel.adapters` has it.
        parameter: the parameter.

    Raises:
        ConfigError: the parameter belongs to no group.

    Example:
        >>> label("model.layers.0.self_attn.q_proj.residual_weight", nn.Parameter(torch.tensor(0.1)))
        'gate'
        >>> label("model.layers.0.self_attn.position_bias", nn.Parameter(torch.zeros(64, 4)))
        'daa'
        >>> label("model.norm.weight", nn.Parameter(torch.ones(8)))
        'unfrozen_norm'
    """
    place, leaf = name.split(".")[0], name.split(".")[-1]
    if place in LABEL_OF_PLACE:
        return LABEL_OF_PLACE[place]
    if leaf in ("weight", "bias"):
        return "unfrozen" if parameter.ndim == 2 else "unfrozen_norm"
    if leaf not in LABEL_OF_LEAF:
        raise ConfigError(
            f"Every trainable parameter belongs to a group: {', '.join(LABEL_OF_LEAF)}, weight, bias, or a "
            f"place {', '.join(LABEL_OF_PLACE)}.",
            name,
            "Add the leaf to the table in hylorada_torch/optimizer.py.",
        )
    return LABEL_OF_LEAF[leaf]


def parameter_groups(
    adapters: Mapping[str, nn.Parameter], training: TrainingConfig, config: HyLoRADAConfig
) -> list[dict[str, Any]]:
    """One AdamW parameter group per label: its parameters, its peak rate ``lr`` and its ``weight_decay``.

    lora_B learns ``lora_plus_ratio`` times as fast as lora_A (LoRA+); matrices decay, gates and norms do not.

    Args:
        adapters: the trainable parameters by name.
        training: ``learning_rate`` and ``weight_decay`` are read.
        config: LoRA+ is read, and for a rate that was not given what is trained of the base.

    Raises:
        ConfigError: a parameter belongs to no group.

    Reference:
        Hayou et al., "LoRA+", 2024; method.md §7.
    """
    labels = {name: label(name, parameter) for name, parameter in adapters.items()}
    rate = training.rate_for(config)
    ratio = config.lora_plus_ratio if config.lora_plus_enabled else 1.0
    return [
        {
            "name": group,
            "params": [parameter for name, parameter in adapters.items() if labels[name] == group],
            "lr": (GROUPS[group].rate or rate) * (ratio if group == "lora_B" else 1.0),
            "weight_decay": training.weight_decay if GROUPS[group].decays else 0.0,
        }
        for group in dict.fromkeys(labels.values())
    ]


def schedule(training: TrainingConfig) -> Callable[[int], float]:
    """Linear warm-up, then a decay to 0 or none, as a part of the peak rate.

    f(t) = t / w  for t < w,  else with p = (t − w) / (T − w)
           1 − p  (linear),  (1 + cos(π p)) / 2  (cosine),  or  1  (constant)

    Args:
        training: ``steps`` is T, `rising_steps` of it is w, and ``schedule`` the shape.

    Returns:
        f, from the number of steps done to the factor on every peak rate.

    Example:
        >>> factor = schedule(TrainingConfig(output="run", steps=6, warmup_ratio=1 / 3))
        >>> [factor(step) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    total, warmup = training.counted_steps(), rising_steps(training)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if training.schedule == "constant":
            return 1.0
        left = max(total - step, 0) / max(total - warmup, 1)
        return left if training.schedule == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2

    return factor


def make_optimizer(
    adapters: Mapping[str, nn.Parameter], training: TrainingConfig, config: HyLoRADAConfig
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the parameter groups, and the scheduler of its rates.

    A step is: backward, `clip_by_global_norm`, ``optimizer.step()``, ``scheduler.step()``.

    Args:
        adapters: the trainable parameters by name.
        training: rates, decay and schedule.
        config: LoRA+.

    Raises:
        ConfigError: a parameter belongs to no group, or there are epochs in place of steps.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; β = (0.9, 0.999), ε = 1e-8.
    """
    optimizer = AdamW(parameter_groups(adapters, training, config), betas=(0.9, 0.999), eps=1e-8)
    return optimizer, LambdaLR(optimizer, schedule(training))


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients, in place, by min(1, max_norm / ‖g‖), the norm taken over all of them together.

    torch.nn.utils.clip_grad_norm_ divides by ‖g‖ + 1e-6 instead, which no paper does and optax does not.

    Args:
        parameters: those whose gradients are clipped; each has one.
        max_norm: the largest norm to leave.

    Reference:
        Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, algorithm 1.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
