"""Attaching adapters to a torch model: the targeted linear layers are replaced, in place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError, NotBuiltError
from hylorada_jax.surgery.targets import layer_ranks, select_targets
from hylorada_torch.linear import DoRALinear, HyLoRADALinear, LoRALinear


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter.

    y = (x Wᵀ + δ)·c + b, or (x Wᵀ + b + δ)·c when ``magnitude_scales_bias``.

    The bias stays outside the scaling because DoRA decomposes the weight alone; so does PEFT, and only so is
    a trained adapter also a DoRA adapter.

    Args:
        base: an nn.Linear (weight [d_out, d_in]) or a GPT-2 Conv1D (weight [d_in, d_out]), bias or not.
        adapter: its adapter.
        magnitude_scales_bias: count the bias as part of what the adapter scales.
    """

    def __init__(
        self, base: nn.Linear | Conv1D, adapter: LoRALinear, *, magnitude_scales_bias: bool = False
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.magnitude_scales_bias = magnitude_scales_bias

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output [..., d_out] of x [..., d_in]."""
        weight, bias = base_weight(self.base), self.base.bias
        if bias is None:
            return self.adapter(x, F.linear(x, weight), weight)
        if self.magnitude_scales_bias:
            return self.adapter(x, F.linear(x, weight, bias), weight)
        return self.adapter(x, F.linear(x, weight), weight) + bias


def base_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight of a linear layer as [d_out, d_in], whichever way round the layer keeps it."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def attach_adapters(model: nn.Module, config: HyLoRADAConfig, *, seed: int = 0) -> dict[str, LoRALinear]:
    """Freeze a model and put adapters on the linear layers that the config targets.

    Args:
        model: any torch module of nn.Linear and GPT-2 Conv1D layers; changed in place.
        config: which layers, which adapter, which rank.
        seed: of the random initial values.

    Returns:
        The adapters by the full name of the layer they adapt, in the model's order.

    Raises:
        NotBuiltError: the config asks for a component that the reference does not have yet.
        ModelError: the model has adapters already.
        TargetError: a pattern matches no linear layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(attach_adapters(model, HyLoRADAConfig(method="dora", target_modules=("0",))))
        ['0']
    """
    _check_built(config)
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ModelError(
            "A model is adapted once", "a model with adapters attached", "Load the base model afresh."
        )
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    selected = select_targets(names, config)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    adapters = {}
    for name, rank in layer_ranks(selected, names, config).items():
        base = model.get_submodule(name)
        adapters[name] = _build_adapter(base_weight(base), rank, config, generator)
        model.set_submodule(
            name, AdaptedLinear(base, adapters[name], magnitude_scales_bias=config.magnitude_scales_bias)
        )
    return adapters


def _build_adapter(
    weight: Tensor, rank: int, config: HyLoRADAConfig, generator: torch.Generator
) -> LoRALinear:
    lora: dict[str, Any] = {
        "rank": rank,
        "alpha": config.lora_alpha * rank / config.lora_rank,  # α keeps its ratio to r
        "dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "generator": generator,
    }
    if config.linear == "lora":
        return LoRALinear(weight, **lora)
    if config.linear == "dora":
        return DoRALinear(weight, detach_norm=bool(config.detach_norm), **lora)
    return HyLoRADALinear(
        weight,
        gate_init=config.gate_init,
        residual_init=config.residual_init,
        detach_norm=bool(config.detach_norm),
        **lora,
    )


def _check_built(config: HyLoRADAConfig) -> None:
    asked = [
        name
        for name in ("position_bias_enabled", "daa_enabled", "sparse_enabled", "s2_attn_enabled")
        if getattr(config, name)
    ]
    if asked or config.linear not in ("lora", "dora", "hylorada_v1"):
        raise NotBuiltError(
            "The reference has the methods lora, dora and hylorada_v1",
            f"method={config.method!r} {' '.join(asked)}".rstrip(),
            "Choose one of these methods and leave the other components off.",
        )
