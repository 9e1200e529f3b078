"""Whether a config or a saved adapter fits a base model, as shapes can tell: before any weight is read."""

from typing import TYPE_CHECKING, Any

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.io.adapter_files import check_base, check_keys
from hylorada_jax.io.base_identity import base_identity
from hylorada_jax.surgery.layout import tensor_shapes
from hylorada_jax.surgery.modules import Modules, find_modules
from hylorada_jax.surgery.plan import Site, plan

if TYPE_CHECKING:
    from hylorada_jax.io.saved_adapter import SavedAdapter
    from hylorada_jax.models.face import BaseModel


def fit(base: "BaseModel", config: HyLoRADAConfig) -> tuple[Modules, tuple[Site, ...]]:
    """What a config adapts in a base model.

    Args:
        base: the base model; its weights are not looked at, so
            :func:`hylorada_jax.models.loading.empty_model` does.
        config: what is adapted, and how.

    Returns:
        The model's modules, and the sites of :func:`hylorada_jax.surgery.plan.plan`.

    Raises:
        TargetError: a pattern matches nothing, or there is no MLP whose last layer is known by name.
        ModelError: the model has nothing that a component could attach to, or cannot do what it asks for.
        ConfigError: shifted sparse attention is on, and a layer has a single head.
    """
    modules = find_modules(base.init_params)
    sites = plan(modules, config)
    if (config.position_bias_enabled or config.use_hylorada_v2) and not modules.take_positions:
        raise ModelError(
            "A layer whose update depends on the position needs a model that takes position_ids",
            base.name,
            "Choose method='hylorada_v1', or a model of the Llama family, GPT-2 or BERT.",
        )
    if config.s2_attn_enabled and not base.supports_groups:
        raise ModelError(
            "Shifted sparse attention needs a causal model whose attention is ours",
            base.name,
            "Leave s2_attn_enabled out, or choose a model of the Llama family or GPT-2.",
        )
    if config.s2_attn_enabled and any(module.heads < 2 for module in modules.attentions):
        raise ConfigError(
            "Shifted sparse attention halves the heads of a layer",
            "1 head",
            "Leave s2_attn_enabled out, or choose a model of more heads.",
        )
    return modules, sites


def identity(base: "BaseModel", modules: Modules) -> dict[str, Any]:
    """What an adapter file says of the base model, which may be without its weights."""
    linears = ((name, m.d_out, m.d_in) for m in modules.linears for name in m.names)
    return base_identity(base.name, base.config, linears)


def check_fits(saved: "SavedAdapter", base: "BaseModel") -> tuple[Site, ...]:
    """Compares a saved adapter with a base model: identity, then names and shapes of all tensors.

    Args:
        saved: from :func:`hylorada_jax.io.saved_adapter.open_adapter`; its tensors are not read.
        base: as for :func:`fit`.

    Returns:
        What the adapter's config adapts in the base model.

    Raises:
        CheckpointError: it was trained on another model, or has other tensors than its config calls for.
        TargetError: as :func:`fit`.
        ModelError: as :func:`fit`.
    """
    modules = find_modules(base.init_params)
    check_base(saved.base, identity(base, modules))
    sites = plan(modules, saved.config)
    check_keys(saved.shapes, tensor_shapes(sites))
    return sites
