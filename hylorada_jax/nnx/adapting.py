"""Adapters put on an NNX model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.math import sparse
from hylorada_jax.nnx.adapted import (
    Adapted,
    AdaptedEmbed,
    AdaptedLinear,
    AdaptedNorm,
    Settings,
    adapted_class,
    dropout,
    plain_class,
    set_class,
)
from hylorada_jax.nnx.finding import Found, find_modules
from hylorada_jax.nnx.variables import AdapterParam
from hylorada_jax.surgery import build
from hylorada_jax.surgery.modules import Modules, Path, subtree, with_leaves
from hylorada_jax.surgery.plan import Site, plan
from hylorada_jax.trees import Adapters, Constants

_Model = TypeVar("_Model", bound=nnx.Module)

# What these need is not in the call of a linear layer, an embedding or a norm.
_OUT_OF_REACH = {
    "position_bias_enabled": "the tokens' positions",
    "use_hylorada_v2": "a structure prior",
    "daa_enabled": "the scores of attention",
    "s2_attn_enabled": "the queries, keys and values of attention",
}
_MIXINS = {"linear": AdaptedLinear, "embedding": AdaptedEmbed, "norm": AdaptedNorm}
# The attributes of an adapted module that are no leaves.
ASIDE = ("adapter_settings", "lora_dropout", "sparse_dropout")


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, at every call of nnx.jit
class Adaptation:
    """What :func:`adapt` has done to a model; its attribute ``hylorada``.

    Attributes:
        config: what is adapted.
        modules: what there was to adapt.
        sites: what is, and with which leaves.
    """

    config: HyLoRADAConfig
    modules: Modules
    sites: tuple[Site, ...]


def adapt(model: _Model, config: HyLoRADAConfig, rngs: nnx.Rngs) -> _Model:
    """Puts adapters on an NNX model, in place; until they train, it computes what it did.

        y = (x Wᵀ + s·(x Aᵀ) Bᵀ)·c + bias   in every adapted linear module
        h + up(gelu(down(h) ⊙ mask))        behind every MLP's last (sparse adapter)

    Linear modules are nnx.Linear, LinearGeneral, Einsum, and what :func:`register_einsum` makes one; their
    names are the model's own paths, "layers.0.attn.query". The leaves lie beside each kernel, as
    :class:`AdapterParam`; embeddings and norms that train become such. Layers that ``nnx.vmap`` stacks have
    stacked leaves. For a copy: ``adapt(nnx.clone(model), …)``.

    Args:
        model: any NNX module, whose other variables stay frozen as long as ``wrt=AdapterParam``.
        config: what is adapted, and how: ``target_modules`` are names, endings of names, regular expressions,
            or "all-linear".
        rngs: of lora_A and of dropout, which is on and off with ``model.train()`` and ``model.eval()``.

    Returns:
        The same model.

    Raises:
        ModelError: it is no NNX module, is adapted already, has no module to adapt, or the config asks for
            what is not in the reach of its modules' calls.
        TargetError: a target matches no layer; near matches are named.
        ConfigError: ``rngs`` are none, or layers that are stacked would be adapted differently.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig
        >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> config = HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules=("query", "value"))
        >>> sorted(nnx.state(adapt(model, config, nnx.Rngs(1)), AdapterParam))
        ['query', 'value']

    Source: method.md §§1, 4.
    """
    if not isinstance(rngs, nnx.Rngs):
        raise ConfigError("rngs are flax.nnx.Rngs.", type(rngs).__name__, "Give nnx.Rngs(0), or your own.")
    adaptation, found = plan_on(model, config)
    sites = adaptation.sites
    raw = {site.module.path: found[site.module.path].leaves() for site in sites}
    paths = [*raw]

    @jax.jit  # so that no kernel is laid out anew to be a matrix
    def constants_of(raw: list[dict[str, Array]]) -> Constants:
        matrices = {path: found[path].as_matrix(leaves) for path, leaves in zip(paths, raw, strict=True)}
        return build.build_constants(sites, tree_of(matrices), config)

    constants = constants_of([*raw.values()])
    seed: Any = jax.random.bits(rngs.params())
    adapters = build.build_adapters(sites, constants, tree_of(raw), config, seed)
    attach(model, adaptation, found, adapters, rngs)
    return model


def plan_on(model: Any, config: HyLoRADAConfig) -> tuple[Adaptation, dict[Path, Found]]:
    """What a config adapts in a model that is not adapted; changes nothing. Errors: as :func:`adapt`."""
    modules, found = find_modules(model)
    if adapted := sorted(".".join(path) for path, here in found.items() if isinstance(here.module, Adapted)):
        raise ModelError(
            "A module is adapted once.",
            f"{adapted[0]} and {len(adapted) - 1} more are adapted already",
            "Take the adapters off with hylorada_jax.nnx.unload(model), or merge them.",
        )
    if out := {name: what for name, what in _OUT_OF_REACH.items() if getattr(config, name)}:
        raise ModelError(
            "adapt reaches what passes through linear layers, embeddings and norms.",
            "; ".join(f"{name} needs {what}" for name, what in out.items()),
            "Choose method='hylorada_v1', 'dora' or 'lora', set these to False where the method allows it, "
            "or call the layers of hylorada_jax.nnx for it (HyLoRADAUnified, PositionalDAA, …) in the model.",
        )
    if not modules.linears and (config.linear or config.sparse_enabled):
        raise ModelError(
            "A model to adapt has nnx.Linear, LinearGeneral or Einsum, or modules of a registered class.",
            f"{type(model).__name__} without",
            "Register the class of its linear layers: hylorada_jax.nnx.register_einsum.",
        )
    sites = plan(modules, config)
    for site in sites:
        if len(site.layers) != len(site.module.names) or len(set(site.scales)) > 1:
            raise ConfigError(
                "Layers that are stacked are adapted all together, at one scale α/r.",
                f"{', '.join(site.names)} of {', '.join(site.module.names)}, at {sorted(set(site.scales))}",
                "Name them all, or stack the layers in a list.",
            )
        here, name = found[site.module.path], ".".join(site.module.path)
        if not isinstance(here.kernel, nnx.Variable):
            raise ModelError(
                "What is adapted holds its weight as an nnx.Param, an array of floats.",
                f"{name}, a {type(here.kernel).__name__} of {type(here.kernel).__module__}",
                "Adapt the model as it was before it was quantised.",
            )
        own = () if site.component == "unfrozen" else site.leaves
        if taken := [leaf for leaf in (*own, *ASIDE) if hasattr(here.module, leaf)]:
            raise ModelError(
                "The names of an adapter's leaves are free in the modules that it adapts.",
                f"{name} has {', '.join(taken)}",
                "Exclude the module: exclude_modules=[its name].",
            )
    return Adaptation(config, modules, sites), found


def attach(
    model: Any, adaptation: Adaptation, found: Mapping[Path, Found], adapters: Adapters, rngs: nnx.Rngs
) -> None:
    """Puts the leaves of an adapter tree on the modules that :func:`plan_on` found."""
    config = adaptation.config
    for site in adaptation.sites:
        here, node = found[site.module.path], subtree(adapters, site.module.path)
        module, layers = here.module, len(site.names) if site.module.stacked else None
        for leaf in site.leaves:
            if site.component != "unfrozen":
                setattr(module, leaf, AdapterParam(node[leaf], component=site.component))
                continue
            variable = getattr(module, leaf)
            variable.set_metadata(component=site.component, base=(type(variable), variable[...].dtype))
            set_class(variable, AdapterParam)
            variable.set_value(node[leaf])
        settings: Settings = getattr(module, "adapter_settings", Settings())
        match site.component:
            case "linear":
                settings = settings._replace(
                    kind=config.linear,
                    scale=site.scales[0],
                    detach_norm=bool(config.detach_norm),
                    scales_bias=config.magnitude_scales_bias,
                )
                module.lora_dropout = dropout(config.lora_dropout, rngs, layers)
            case "sparse":
                settings = settings._replace(
                    units_on=sparse.units_on(config.sparse_topk_ratio, config.sparse_adapter_dim),
                    temperature=config.sparse_temperature,
                )
                module.sparse_dropout = dropout(config.sparse_dropout, rngs, layers)
        if here.kind.role == "linear":
            module.adapter_settings = settings
        set_class(module, adapted_class(_MIXINS[here.kind.role], plain_class(type(module))))
    model.hylorada = adaptation


def adaptation_of(model: Any) -> tuple[Adaptation, dict[Path, Found]]:
    """What :func:`adapt` has done to a model; a ModelError where it has not."""
    found = find_modules(model)[1]
    if not isinstance(adaptation := getattr(model, "hylorada", None), Adaptation):
        raise ModelError(
            "This takes a model that was adapted, as a whole.",
            f"{type(model).__name__}, which was not",
            "Give the model that hylorada_jax.nnx.adapt or load_adapter was called with.",
        )
    return adaptation, found


def adapters_of(adaptation: Adaptation, found: Mapping[Path, Found]) -> Adapters:
    """The adapters of a model, as the tree of the surgery."""
    leaves: dict[Path, dict[str, Array]] = {}
    for site in adaptation.sites:
        module = found[site.module.path].module
        leaves.setdefault(site.module.path, {}).update(
            {leaf: getattr(module, leaf)[...] for leaf in site.leaves}
        )
    return tree_of(leaves)


def tree_of(leaves: Mapping[Path, Mapping[str, Array]]) -> dict[str, Any]:
    """The leaves of modules by path, as the nested tree of the surgery."""
    tree: dict[str, Any] = {}
    for path, node in leaves.items():
        tree = with_leaves(tree, path, node)
    return tree
