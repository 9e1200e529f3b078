"""Attaching adapters to a torch model, in place."""

import dataclasses
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.models.families import RELATIVE_POSITIONS
from hylorada_jax.surgery.targets import mlp_outputs, select_targets, self_attentions
from hylorada_jax.text import short
from hylorada_torch.forward_pass import Passes
from hylorada_torch.hf_attention import AdaptedAttention, adapt_attention, check_attentions
from hylorada_torch.linear import (
    DoRALinear,
    HyLoRADALinear,
    HyLoRADAUnified,
    HyLoRADAv2Linear,
    LoRALinear,
)
from hylorada_torch.position import PositionBias
from hylorada_torch.settings import layer_alphas, layer_ranks
from hylorada_torch.sparse import SparseAdapter
from hylorada_torch.structure import StructureEncoder, TemporalStructureEncoder


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter.

    y = (x Wᵀ + δ·p)·c + b, or (x Wᵀ + b + δ·p)·c when ``magnitude_scales_bias``.

    The bias stays outside the scaling, as in DoRA and PEFT: only then is a trained adapter also a DoRA
    adapter.

    Args:
        base: an nn.Linear (weight [d_out, d_in]) or a GPT-2 Conv1D (weight [d_in, d_out]), bias or not.
        adapter: its adapter.
        passes: gives `HyLoRADAUnified` the positions and `HyLoRADAv2Linear` the structure prior.
        magnitude_scales_bias: count the bias as part of what the adapter scales.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        adapter: LoRALinear,
        passes: Passes,
        *,
        magnitude_scales_bias: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.passes = passes
        self.magnitude_scales_bias = magnitude_scales_bias

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in], whose dtype T5 asks for."""
        return base_weight(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output [..., d_out] of x [..., d_in]."""
        bias = self.base.bias
        if bias is None:
            return self._adapt(x, F.linear(x, self.weight))
        if self.magnitude_scales_bias:
            return self._adapt(x, F.linear(x, self.weight, bias))
        return self._adapt(x, F.linear(x, self.weight)) + bias

    def _adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        if isinstance(self.adapter, HyLoRADAv2Linear):
            return self.adapter(x, base_output, self.weight, self.passes.current.structure_prior)
        if isinstance(self.adapter, HyLoRADAUnified):
            return self.adapter(x, base_output, self.weight, self.passes.current.positions)
        return self.adapter(x, base_output, self.weight)


def base_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight of a linear layer as [d_out, d_in], whichever way round the layer keeps it."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def linears_of(model: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    """The linear layers of a model that is not adapted, by name."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]


@dataclasses.dataclass
class Attached:
    """What `attach_adapters` has put into a model.

    Args:
        passes: where its layers look for the forward pass.
        structure_encoder: the one encoder of a v2 model.
        owners: (place, module): the module's own parameters train, and are named by the place.
    """

    passes: Passes
    structure_encoder: StructureEncoder | None = None
    owners: list[tuple[str, nn.Module]] = dataclasses.field(default_factory=list)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that trains, ``<place>.<leaf>``, in the order it was attached; what is shared is there once."""
        named: dict[nn.Parameter, str] = {}
        for place, module in self.owners:
            for leaf, parameter in module.named_parameters(recurse=False):
                named.setdefault(parameter, f"{place}.{leaf}" if place else leaf)
        return {name: parameter for parameter, name in named.items()}


def attach_adapters(model: nn.Module, config: HyLoRADAConfig, *, seed: int = 0) -> Attached:
    """Freeze a model and attach every component that the config names.

    Args:
        model: any torch module of nn.Linear and GPT-2 Conv1D layers, for linear adapters; of transformers,
            for the rest. Changed in place.
        config: what is attached, where, at which rank.
        seed: of the random initial values.

    Returns:
        The trainable parameters and what a forward pass must provide.

    Raises:
        ModelError: the model has adapters already, or its attention or dtype cannot be adapted.
        TargetError: a pattern matches no linear layer, or there is no MLP or attention to adapt.
        ConfigError: a component does not go with this kind of model, or an expert's update would depend on
            the position: its layers are given tokens without their places.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(attach_adapters(model, HyLoRADAConfig(method="dora", target_modules=("0",))).parameters())
        ['0.lora_A', '0.lora_B', '0.magnitude']
    """
    if any(isinstance(part, (AdaptedLinear, AdaptedAttention, SparseAdapter)) for part in model.modules()):
        raise ModelError(
            "A model is adapted once.", "a model with adapters attached", "Load the base model afresh."
        )
    if config.depends_on_token and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            "A position bias and a structure prior belong to one sequence of tokens.",
            f"method={config.method!r} for an encoder-decoder model",
            "Choose another method, such as hylorada_v1.",
        )
    names = [name for name, _ in linears_of(model)]
    ranks = layer_ranks(select_targets(names, config), names, config)
    experts = [name for name in ranks if "expert" in name]
    if experts and config.depends_on_token:
        raise ConfigError(
            "In the reference the update of an expert does not depend on its tokens' positions.",
            f"method={config.method!r} for {short(experts)}",
            "Choose other layers (target_modules), or another method.",
        )
    alphas = layer_alphas(ranks, names, config)
    attentions = self_attentions(names) if config.daa_enabled or config.s2_attn_enabled else []
    mlps = mlp_outputs(names) if config.sparse_enabled else []
    unfrozen = _unfrozen(model, config)

    check_attentions(model, attentions, config)

    model.requires_grad_(False)
    # All is drawn on the CPU, where a seed always gives the same values, and goes to its layer's device.
    generator = torch.Generator().manual_seed(seed)
    first = next(model.parameters())
    dtype = torch.promote_types(first.dtype, torch.float32)
    passes, position_bias = Passes(), PositionBias(dtype=dtype).to(first.device)
    attached = Attached(passes)
    if config.position_bias_enabled:
        attached.owners.append(("", position_bias))
    for name, rank in ranks.items():
        base = model.get_submodule(name)
        adapter = _build_linear(base_weight(base), rank, alphas[name], config, generator, position_bias)
        scales_bias = config.magnitude_scales_bias
        model.set_submodule(name, AdaptedLinear(base, adapter, passes, magnitude_scales_bias=scales_bias))
        attached.owners.append((name, adapter))
    for name in attentions:
        if daa := adapt_attention(model, name, config, passes).daa:
            attached.owners.append((name, daa))
    for name in mlps:
        attached.owners.append((name, _follow_by_sparse(model.get_submodule(name), config, generator, dtype)))
    if config.use_hylorada_v2:
        kind = TemporalStructureEncoder if config.structure_encoder_type == "temporal" else StructureEncoder
        encoder = kind(config.structure_dim, generator=generator, dtype=dtype).to(first.device)
        attached.structure_encoder = encoder
        attached.owners.append(("structure_encoder", attached.structure_encoder))
    for name, module in unfrozen:
        module.requires_grad_(True)
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # else torch would give that row, and no other, no gradient
        attached.owners.append((name, module))
    return attached


def _build_linear(
    weight: Tensor,
    rank: int,
    alpha: float,
    config: HyLoRADAConfig,
    generator: torch.Generator,
    position_bias: PositionBias,
) -> LoRALinear:
    d_out, d_in = weight.shape
    options: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "lora_A_init": config.lora_A_init,
        "lora_A_gain": config.lora_A_gain,
        "generator": generator,
        "dtype": torch.promote_types(weight.dtype, torch.float32),
    }
    norm: dict[str, Any] = {"detach_norm": bool(config.detach_norm)}
    gates = norm | {"gate_init": config.gate_init, "residual_init": config.residual_init}
    adapter: DoRALinear
    match config.linear:
        case "lora":
            return LoRALinear(d_in, d_out, **options).to(weight.device)
        case "dora":
            adapter = DoRALinear(d_in, d_out, **options, **norm)
        case "hylorada_v1":
            adapter = HyLoRADALinear(d_in, d_out, **options, **gates)
        case "hylorada_v2":
            gates["structure_dim"] = config.structure_dim
            adapter = HyLoRADAv2Linear(d_in, d_out, **options, **gates)
        case "hylorada":
            adapter = HyLoRADAUnified(d_in, d_out, **options, **gates, position_bias=position_bias)
        case None:
            raise AssertionError(config.method)  # it adapts no linear layer
        case _:
            assert_never(config.linear)
    adapter.to(weight.device)
    adapter.init_magnitude(weight)
    return adapter


def _follow_by_sparse(
    layer: nn.Module, config: HyLoRADAConfig, generator: torch.Generator, dtype: torch.dtype
) -> SparseAdapter:
    """Let a sparse adapter act on the whole output of a layer, its bias and its own adapter included."""
    weight = base_weight(layer.base if isinstance(layer, AdaptedLinear) else layer)
    layer.sparse = SparseAdapter(
        len(weight),
        config.sparse_adapter_dim,
        config.sparse_topk_ratio,
        config.sparse_temperature,
        config.sparse_dropout,
        generator=generator,
        dtype=dtype,
    ).to(weight.device)
    layer.register_forward_hook(lambda layer, _, output: layer.sparse(output))
    return layer.sparse


def _unfrozen(model: nn.Module, config: HyLoRADAConfig) -> list[tuple[str, nn.Module]]:
    """The embeddings and norms that train themselves (LongLoRA)."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        # T5's table of relative positions is an nn.Embedding, but embeds no token and no position.
        if (
            config.train_embeddings
            and isinstance(module, nn.Embedding)
            and not name.endswith(RELATIVE_POSITIONS)
        )
        or (config.train_norms and type(module).__name__.endswith(("LayerNorm", "RMSNorm")))
    ]
    narrow = {p.dtype for _, module in found for p in module.parameters()} - {torch.float32, torch.float64}
    if narrow:
        raise ModelError(
            "Embeddings and norms train in place, in float32 at least.",
            f"{', '.join(map(str, narrow))}",
            "Load the model in float32.",
        )
    return found
