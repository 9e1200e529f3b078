"""Whether a config fits a base model, as shapes can tell: before any weight is read."""

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.models.base_model import BaseModel, require_groups
from hylorada_jax.surgery.modules import Modules, modules_of, require_positions
from hylorada_jax.surgery.plan import Site, plan


def fit(
    base: BaseModel, config: HyLoRADAConfig, modules: Modules | None = None
) -> tuple[Modules, tuple[Site, ...]]:
    """What a config adapts in a base model.

    Args:
        base: the base model; its weights are not read, so
            :func:`hylorada_jax.models.loading.empty_model` does.
        config: what is adapted, and how.
        modules: the model's, where they are known already.

    Returns:
        The model's modules, and the sites of :func:`hylorada_jax.surgery.plan.plan`.

    Raises:
        TargetError: a pattern matches nothing, or there is no MLP whose last layer is known by name.
        ModelError: the model has nothing that a component could attach to, or cannot do what it asks for.
        ConfigError: shifted sparse attention is on, and a layer has a single head; or a position bias or a
            structure prior is asked for, and the model is an encoder-decoder.
    """
    modules = modules_of(base) if modules is None else modules
    sites = plan(modules, config)
    if config.depends_on_token:
        if base.is_encoder_decoder:  # whose cross-attentions have keys of the one and queries of the other
            raise ConfigError(
                "A position bias and a structure prior belong to one sequence of tokens.",
                f"method={config.method!r} for {base.name}, an encoder-decoder",
                "Choose another method, such as hylorada_v1.",
            )
        require_positions(modules.take_positions, base.name)
    if config.s2_attn_enabled:
        require_groups(base, base.name)
        if any(module.heads < 2 for module in modules.attentions):
            raise ConfigError(
                "Shifted sparse attention halves the heads of a layer.",
                "1 head",
                "Leave s2_attn_enabled out, or choose a model of more heads.",
            )
    return modules, sites
