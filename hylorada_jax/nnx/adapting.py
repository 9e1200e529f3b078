"""Adapters on an NNX model: put on, folded into the weights, taken off."""

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
from hylorada_jax.surgery import merge as merging
from hylorada_jax.surgery.modules import Modules, Path, subtree, with_leaves
from hylorada_jax.surgery.plan import Site, plan
from hylorada_jax.surgery.resolve import resolve
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
_ASIDE = ("adapter_settings", "lora_dropout", "sparse_dropout")


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, at every call of nnx.jit
class Adaptation:
    """What :func:`adapt` has done to a model; its attribute ``adaptation``.

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

    @jax.jit  # so that no kernel is laid out anew to be a matrix
    def constants_of(raw: list[dict[str, Array]]) -> Constants:
        matrices = {path: found[path].as_matrix(leaves) for path, leaves in zip(paths, raw, strict=True)}
        return build.build_constants(sites, _tree(matrices), config)

    paths = [*raw]
    constants = constants_of([*raw.values()])
    seed: Any = jax.random.bits(rngs.params())
    adapters = build.build_adapters(sites, constants, _tree(raw), config, seed)
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
        here = found[site.module.path].module
        if taken := [leaf for leaf in (*site.leaves, *_ASIDE) if _is_taken(site, here, leaf)]:
            raise ModelError(
                "The names of an adapter's leaves are free in the modules that it adapts.",
                f"{'.'.join(site.module.path)} has {', '.join(taken)}",
                "Exclude the module: exclude_modules=[its name].",
            )
    return Adaptation(config, modules, sites), found


def _is_taken(site: Site, module: Any, name: str) -> bool:
    return site.component != "unfrozen" and hasattr(module, name)


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
    model.adaptation = adaptation


def adaptation_of(model: Any) -> tuple[Adaptation, dict[Path, Found]]:
    """What :func:`adapt` has done to a model; a ModelError where it has not."""
    found = find_modules(model)[1]
    if not isinstance(adaptation := getattr(model, "adaptation", None), Adaptation):
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
    return _tree(leaves)


def merge(model: _Model) -> _Model:
    """Folds the adapters into the weights, in place: a plain model that computes what the adapted one did.

        W' = c ⊙ (W + s·B A)

    Args:
        model: one that :func:`adapt` was called with.

    Returns:
        The same model, its modules of their own classes again, with no adapter on it.

    Raises:
        ModelError: it is not adapted, a sparse adapter has learnt something, or a kernel that is adapted is
            also that of another module.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="lora", target_modules="all-linear"), nnx.Rngs(1))
        >>> len(nnx.state(merge(model), AdapterParam))
        0

    Source: method.md §1, Merging.
    """
    adaptation, found = adaptation_of(model)
    config, adapters = adaptation.config, adapters_of(adaptation, found)
    merging.check_mergeable(adaptation.sites, adapters)
    _refuse_shared(adaptation, found)
    for site in adaptation.sites:  # one after another: no second copy of all weights
        here, path = found[site.module.path], site.module.path
        if site.component == "linear":
            _merge_linear(site, here, adapters, config)
        elif site.component == "unfrozen":
            for leaf in site.leaves:
                variable = getattr(here.module, leaf)
                cls, dtype = variable.get_metadata("base")
                variable.set_value(subtree(adapters, path)[leaf].astype(dtype))
                variable.del_metadata("base")
                variable.del_metadata("component")
                set_class(variable, cls)
    _strip(model, adaptation, found)
    return model


def _merge_linear(site: Site, here: Found, adapters: Adapters, config: HyLoRADAConfig) -> None:
    params = _tree({site.module.path: here.as_matrix(here.leaves())})
    constants = build.build_constants((site,), params, config)
    resolved = resolve((site,), adapters, params, constants, config)
    merged = subtree(merging.merge((site,), resolved, params, config), site.module.path)
    assert here.form is not None
    here.kernel.set_value(here.form.kernel_of(merged["kernel"], here.kernel.shape))
    if config.magnitude_scales_bias and "bias" in merged:
        here.module.bias.set_value(merged["bias"].reshape(here.module.bias.shape))


def _refuse_shared(adaptation: Adaptation, found: Mapping[Path, Found]) -> None:
    owners: dict[int, list[Path]] = {}
    for path, here in found.items():
        for name in here.kind.leaves:
            if (variable := getattr(here.module, name, None)) is not None:
                owners.setdefault(id(variable), []).append(path)
    paths = {site.module.path for site in adaptation.sites if site.component == "linear"}
    for shared in owners.values():
        if len(shared) > 1 and paths & {*shared}:
            raise ModelError(
                "A kernel is merged where one module alone reads it.",
                f"that of {' and '.join('.'.join(path) for path in shared)}",
                "Keep the adapter beside the model, or give each module a kernel of its own first.",
            )


def unload(model: _Model) -> _Model:
    """Takes the adapters off a model, in place; what they have learnt is lost.

    Args:
        model: one that :func:`adapt` was called with.

    Returns:
        The same model, as it was before.

    Raises:
        ModelError: it is not adapted, or embeddings or norms themselves have trained.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="lora", target_modules="all-linear"), nnx.Rngs(1))
        >>> type(unload(model).layers[0]).__name__
        'Linear'
    """
    adaptation, found = adaptation_of(model)
    if trained := [".".join(s.module.path) for s in adaptation.sites if s.component == "unfrozen"]:
        raise ModelError(
            "What is taken off has left the base's own variables alone.",
            f"{', '.join(trained[:4])}, which trained themselves",
            "Merge the adapters, or load the base anew.",
        )
    _strip(model, adaptation, found)
    return model


def _strip(model: Any, adaptation: Adaptation, found: Mapping[Path, Found]) -> None:
    for site in adaptation.sites:
        module = found[site.module.path].module
        own = () if site.component == "unfrozen" else site.leaves
        for name in (*own, *_ASIDE):
            if hasattr(module, name):
                delattr(module, name)
        set_class(module, plain_class(type(module)))
    del model.adaptation


def _tree(leaves: Mapping[Path, Mapping[str, Array]]) -> dict[str, Any]:
    """The leaves of modules by path, as the nested tree of the surgery."""
    tree: dict[str, Any] = {}
    for path, node in leaves.items():
        tree = with_leaves(tree, path, node)
    return tree
