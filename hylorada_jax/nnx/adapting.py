"""Adapters put on an NNX model."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.leaves import POSITION_BIAS, STRUCTURE_ENCODER, leaf_of
from hylorada_jax.math import sparse
from hylorada_jax.math.explicit import explicit_axes
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
from hylorada_jax.nnx.adapted_attention import AdaptedAttention, AdaptedMultiHead, AdaptedScores
from hylorada_jax.nnx.adapted_model import AdaptedModel
from hylorada_jax.nnx.finding import Found, find_modules
from hylorada_jax.nnx.kinds import ATTENTIONS, Role
from hylorada_jax.nnx.quantized import is_quantized, numbers, value_of
from hylorada_jax.nnx.streams import check_streams
from hylorada_jax.nnx.variables import AdapterParam
from hylorada_jax.structure.code import Domain
from hylorada_jax.surgery import build
from hylorada_jax.surgery.modules import Modules, subtree, with_leaves
from hylorada_jax.surgery.plan import Site, plan
from hylorada_jax.trees import Adapters, Constants, TreePath

_Model = TypeVar("_Model", bound=nnx.Module)

_MIXINS: dict[Role, Any] = {
    "linear": AdaptedLinear,
    "embedding": AdaptedEmbed,
    "norm": AdaptedNorm,
    "attention": AdaptedAttention,
    "scores": AdaptedScores,
    "multi_head": AdaptedMultiHead,
}
_OF_THE_MODEL = (POSITION_BIAS, STRUCTURE_ENCODER)
# The attributes of an adapted module that are no leaves: of linear ones what their calls read of the config,
# of attention what was done to the model.
ASIDE = ("adapter_settings", "adaptation", "lora_dropout", "sparse_dropout")


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, at every call of nnx.jit
class Adaptation:
    """What :func:`adapt` has done to a model; its attribute ``hylorada``.

    Attributes:
        config: what is adapted.
        modules: what there was to adapt.
        sites: what is, and with which leaves.
        resolved: it is the model that :func:`hylorada_jax.nnx.resolve` gives.
        chat_template: with which the adapter was trained, where its files say so.
        structure: what it was trained to read of a text, where they say so.
    """

    config: HyLoRADAConfig
    modules: Modules
    sites: tuple[Site, ...]
    resolved: bool = False
    chat_template: str | None = None
    structure: Domain | None = None

    @functools.cached_property
    def once_resolved(self) -> "Adaptation":
        """That of the model's resolved ones: the same for all of them, which nnx.jit compiles once."""
        return dataclasses.replace(self, resolved=True)


def adapt(model: _Model, config: HyLoRADAConfig, rngs: nnx.Rngs) -> _Model:
    """Puts adapters on an NNX model, in place; until they train, it computes what it did in ``model.eval()``.

        y = (x Wᵀ + s·(x Aᵀ) Bᵀ)·c + bias   in every adapted linear module
        h + up(gelu(down(h) ⊙ mask))        behind every MLP's last (sparse adapter)
        α_h·S + β_h + position_bias         on the scores S of attention that adapters reach

    Linear modules are nnx.Linear, LinearGeneral, Einsum, and what :func:`register_einsum` makes one; their
    names are the model's own paths, "layers.0.attn.query". The leaves lie beside each kernel, as
    :class:`AdapterParam`; embeddings and norms that train become such. Layers that ``nnx.vmap`` stacks have
    stacked leaves. For a copy: ``adapt(nnx.clone(model), …)``.

    Adapters reach attention in :class:`Attention` and :class:`AttentionScores`, which a model's author calls,
    and in nnx.MultiHeadAttention. Positions are read off the model's own call, see :func:`tokens`.

    Args:
        model: any NNX module, whose other variables stay frozen as long as ``wrt=AdapterParam``.
        config: what is adapted, and how: ``target_modules`` are names, endings of names, regular expressions,
            or "all-linear".
        rngs: for lora_A and dropout. Dropout and shifted sparse attention are on at once, as in any NNX
            module; ``model.eval()`` and ``model.train()`` turn them off and on.

    Returns:
        The same model.

    Raises:
        ModelError: it is no NNX module, is adapted already, has no module to adapt, one that lacks what its
            class is registered by, or one without floating-point numbers; or the config asks for what its
            attention does not let in, or for a scaled bias in a module of a registered class; or an
            attribute has an adapter's name; or explicit mesh axes cut a kernel within d_out.
        TargetError: a target matches no layer; near matches are named.
        ConfigError: ``rngs`` are none, or lack a stream; or stacked layers would be adapted differently.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig
        >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> config = HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules=("query", "value"))
        >>> sorted(nnx.state(adapt(model, config, nnx.Rngs(1)), AdapterParam))
        ['query', 'value']

    Source: method.md §§1, 4.
    """
    modules, found = find_modules(model)
    adaptation = plan_on(model, config, modules, found)
    sites = adaptation.sites
    check_rngs(rngs, adaptation, "params")
    raw = {
        site.module.path: found[site.module.path].leaves()
        for site in sites
        if site.component in ("linear", "sparse", "unfrozen")
    }
    paths = [*raw]

    @jax.jit  # so that no kernel is laid out anew to be a matrix
    def constants_of(raw: list[dict[str, Any]]) -> Constants:
        matrices = {path: found[path].as_matrix(leaves) for path, leaves in zip(paths, raw, strict=True)}
        return build.build_constants(sites, tree_of(matrices), config)

    constants = constants_of([*raw.values()])
    seed: Any = jax.random.bits(rngs.params())
    adapters = build.build_adapters(sites, constants, tree_of(raw), config, seed)
    attach(model, adaptation, found, adapters, rngs)
    return model


def plan_on(
    model: Any, config: HyLoRADAConfig, modules: Modules, found: Mapping[TreePath, Found]
) -> Adaptation:
    """What a config adapts in a model that is not adapted; changes nothing.

    Errors: as :func:`adapt`.

    Args:
        model: the model.
        config: what is to be adapted.
        modules: the model's, of :func:`hylorada_jax.nnx.finding.find_modules`.
        found: each of them by its path, from there too.
    """
    adapted = sorted(".".join(path) for path, here in found.items() if isinstance(here.module, Adapted))
    if known_adaptation(model) is not None:  # or disabled, where no module shows it
        adapted = adapted or ["the model"]
    if adapted:
        raise ModelError(
            "A module is adapted once.",
            f"{adapted[0]} and {len(adapted) - 1} more are adapted already",
            "Take the adapters off with hylorada_jax.nnx.unload(model), or merge them.",
        )
    _refuse_closed(model, modules, found, config)
    if not modules.linears and (config.linear or config.sparse_enabled):
        raise ModelError(
            "A model to adapt has nnx.Linear, LinearGeneral or Einsum, or modules of a registered class.",
            f"{type(model).__name__} without",
            "Register the class of its linear layers: hylorada_jax.nnx.register_einsum.",
        )
    sites = plan(modules, config)
    _refuse_taken(model, config, sites, found)
    for site in sites:
        if site.component not in ("linear", "sparse", "unfrozen"):
            continue
        if len(site.layers) != len(site.module.names) or len(set(site.scales)) > 1:
            raise ConfigError(
                "Layers that are stacked are adapted all together, at one scale α/r.",
                f"{', '.join(site.names)} of {', '.join(site.module.names)}, at {sorted(set(site.scales))}",
                "Name them all, or stack the layers in a list.",
            )
        here, name = found[site.module.path], ".".join(site.module.path)
        has_bias = isinstance(getattr(here.module, "bias", None), nnx.Variable)
        scaled = site.component == "linear" and config.magnitude_scales_bias
        if scaled and has_bias and "bias" not in here.kind.leaves:
            raise ModelError(
                "A bias that is scaled with the rest is of a class of Flax's own, for merging scales it too.",
                f"{name} ({type(here.module).__name__}) with a bias, of a class of register_einsum",
                "Set magnitude_scales_bias=False, or exclude_modules=[its name].",
            )
        if not isinstance(here.kernel, nnx.Variable) and not is_quantized(here.kernel):
            raise ModelError(
                "What is adapted holds its weight as an nnx.Param, or as qwix's array of one.",
                f"{name}, a {type(here.kernel).__name__} of {type(here.kernel).__module__}",
                "Adapt the model as it was before it was quantised.",
            )
        if not (is_quantized(here.kernel) or jnp.issubdtype(here.kernel.dtype, jnp.floating)):
            raise ModelError(
                "What is adapted holds floating-point numbers.",
                f"{name}, {here.kernel.dtype}",
                "Adapt the model in float32 or bfloat16, or exclude_modules=[its name].",
            )
        form = here.form if explicit_axes() else None
        if form and not form.is_mergeable(kernel := numbers(value_of(here.kernel))):
            raise ModelError(
                "On explicit mesh axes a kernel is cut over the first axis of its inputs or its outputs, as "
                "its matrix can be.",
                f"{name}, {jax.typeof(kernel)}",
                "Make it several layers, as of query, key and value, or the mesh's axes AxisType.Auto.",
            )
    return Adaptation(config, modules, sites)


def check_rngs(rngs: Any, adaptation: Adaptation, *streams: str) -> None:
    """Refuses rngs without these streams, or without one for the dropout that there is."""
    config = adaptation.config
    rates = {"linear": config.lora_dropout, "sparse": config.sparse_dropout}
    if any(rates.get(site.component) for site in adaptation.sites):
        streams = (*streams, "dropout")
    check_streams(rngs, *streams)


def _refuse_closed(
    model: Any, modules: Modules, found: Mapping[TreePath, Found], config: HyLoRADAConfig
) -> None:
    """Refuses what acts in attention, where the model's does not let it in."""
    roles = {found[attention.path].kind.role for attention in modules.attentions}
    refused = []
    if config.daa_enabled and not roles:
        refused.append("direct attention adaptation (daa_enabled)")
    if config.s2_attn_enabled and roles != {"attention"}:
        refused.append("shifted sparse attention (s2_attn_enabled)")
    if refused:
        raise ModelError(
            "Attention is open to adapters in hylorada_jax.nnx.Attention; to direct adaptation alone in "
            "AttentionScores and nnx.MultiHeadAttention.",
            f"{' and '.join(refused)} for {type(model).__name__}",
            "Make an Attention(num_heads) in the model's own attention and call it; or set these to False, "
            "as method='hylorada_v1' does.",
        )
    if (
        config.position_bias_enabled
        and config.daa_position_bias
        and () in {a.path for a in modules.attentions}
    ):
        raise ModelError(
            "The position bias of a model and that of its attention lie in two modules.",
            f"{type(model).__name__}, which is its own attention",
            "Put the attention into a module, or set daa_position_bias=False.",
        )


def _refuse_taken(
    model: Any, config: HyLoRADAConfig, sites: Sequence[Site], found: Mapping[TreePath, Found]
) -> None:
    """Refuses attributes of the author's with the names of what adapters, or :func:`resolve`, put there."""
    new: list[tuple[TreePath, Any, Iterable[str]]] = [((), model, ["hylorada"])]
    for site in sites:
        leaves = site.leaves if site.component in ("linear", "sparse") else ()
        resolved = [name for leaf in leaves if (name := leaf_of(site.component, leaf).resolved)]
        new.append((site.module.path, module_of(model, found, site), [*own_attributes(site), *resolved]))
    new += [(path, here.module, ASIDE) for path, here in changed_modules(config, sites, found).items()]
    for path, module, names in new:
        if taken := [name for name in dict.fromkeys(names) if hasattr(module, name)]:
            raise ModelError(
                "The names of an adapter's leaves, and of what lies beside them, are free in what it adapts.",
                f"{'.'.join(path) or 'the model'} has {', '.join(taken)}",
                "Exclude the module, exclude_modules=[its name], or rename the attribute.",
            )


def own_attributes(site: Site) -> tuple[str, ...]:
    """The attributes in which a site's module holds leaves that the base has not."""
    return {"unfrozen": (), STRUCTURE_ENCODER: (STRUCTURE_ENCODER,)}.get(site.component, site.leaves)


def module_of(model: Any, found: Mapping[TreePath, Found], site: Site) -> Any:
    """The module that a site's leaves lie in; for what serves the whole model that is the model."""
    return model if site.component in _OF_THE_MODEL else found[site.module.path].module


def changed_modules(
    config: HyLoRADAConfig, sites: Sequence[Site], found: Mapping[TreePath, Found]
) -> dict[TreePath, Found]:
    """The modules whose calls adapters change: those of the sites, and all attention where it is adapted."""
    paths = {site.module.path for site in sites}
    in_attention = _in_attention(config)
    return {
        path: here
        for path, here in found.items()
        if (in_attention if here.kind.role in ATTENTIONS else path in paths)
    }


def _in_attention(config: HyLoRADAConfig) -> bool:
    return bool(config.daa_enabled or config.s2_attn_enabled)


def _holder(model: Any, found: Mapping[TreePath, Found], site: Site) -> Any:
    """What has a site's leaves as its attributes: the module, or in it the structure encoder."""
    module = module_of(model, found, site)
    return module.structure_encoder if site.component == STRUCTURE_ENCODER else module


def attach(
    model: Any,
    adaptation: Adaptation,
    found: Mapping[TreePath, Found],
    adapters: Adapters,
    rngs: nnx.Rngs | None,
) -> None:
    """Puts the leaves of an adapter tree on the modules that :func:`plan_on` found; no rngs: to infer."""
    config = adaptation.config
    drawn = nnx.Rngs(0) if rngs is None else rngs  # one for all layers: their masks are not the same
    off = rngs is None
    for site in adaptation.sites:
        if site.component == STRUCTURE_ENCODER:
            model.structure_encoder = nnx.Dict()
        node, module = subtree(adapters, site.module.path), _holder(model, found, site)
        layers = len(site.names) if site.module.stacked else None
        if site.component in ("linear", "sparse"):
            settings = getattr(module, "adapter_settings", Settings())
            module.adapter_settings = _settings(site, settings, config)
        if site.component == "linear":
            module.lora_dropout = dropout(config.lora_dropout, drawn, layers, deterministic=off)
        elif site.component == "sparse":
            module.sparse_dropout = dropout(config.sparse_dropout, drawn, layers, deterministic=off)
        for leaf in site.leaves:
            if site.component != "unfrozen":
                setattr(module, leaf, AdapterParam(node[leaf], component=site.component))
                continue
            variable = getattr(module, leaf)
            if variable.has_metadata("base"):
                continue  # of a module before, which shares it
            variable.set_metadata(component=site.component, base=(type(variable), variable[...].dtype))
            set_class(variable, AdapterParam)
            variable.set_value(node[leaf])
    for here in changed_modules(config, adaptation.sites, found).values():
        if here.kind.role in ATTENTIONS:
            here.module.adaptation = adaptation
            if off and here.kind.role == "attention":
                here.module.deterministic = True  # no groups, as no dropout, until model.train()
        set_class(here.module, adapted_class(_MIXINS[here.kind.role], plain_class(type(here.module))))
    if _in_attention(config) or config.depends_on_token:
        cls: Any = type(model)
        set_class(model, adapted_class(AdaptedModel, cls))
    model.hylorada = adaptation


def _settings(site: Site, settings: Settings, config: HyLoRADAConfig) -> Settings:
    if site.component == "linear":
        return settings._replace(
            kind=config.linear,
            scale=site.scales[0],
            detach_norm=bool(config.detach_norm),
            scales_bias=config.magnitude_scales_bias,
        )
    units_on = sparse.units_on(config.sparse_topk_ratio, config.sparse_adapter_dim)
    return settings._replace(units_on=units_on, temperature=config.sparse_temperature)


def known_adaptation(module: Any) -> Adaptation | None:
    """What :func:`adapt` has done to a module; None where it has not, whatever else is called `hylorada`."""
    found = getattr(module, "hylorada", None)
    return found if isinstance(found, Adaptation) else None


def adaptation_of(model: Any) -> tuple[Adaptation, dict[TreePath, Found]]:
    """What :func:`adapt` has done to a model; a ModelError where it has not."""
    found = find_modules(model)[1]
    if (adaptation := known_adaptation(model)) is None:
        raise ModelError(
            "This takes a model that was adapted, as a whole.",
            f"{type(model).__name__}, which was not",
            "Give the model that hylorada_jax.nnx.adapt or load_adapter was called with.",
        )
    if adaptation.resolved:
        raise ModelError(
            "What is resolved computes; it is not trained, saved, merged or taken off.",
            f"{type(model).__name__} of hylorada_jax.nnx.resolve",
            "Give the model that it was resolved from.",
        )
    return adaptation, found


def adapters_of(model: Any, adaptation: Adaptation, found: Mapping[TreePath, Found]) -> Adapters:
    """The adapters of a model, as the tree of the surgery; a ModelError for layers stacked afterwards."""
    leaves: dict[TreePath, dict[str, Array]] = {}
    for site in adaptation.sites:
        module = _holder(model, found, site)
        own = {leaf: getattr(module, leaf)[...] for leaf in site.leaves}
        for leaf, shape in site.shapes[0]:
            if own[leaf].ndim != len(shape) + site.module.stacked:  # it would be read along other axes
                raise ModelError(
                    "Layers are stacked before they are adapted, and such a model is read whole.",
                    f"{leaf} {own[leaf].shape} of {site.names[0]}, {shape} in each of {len(site.names)}",
                    "Make the layers with nnx.vmap, then adapt the model; what has been learnt goes over by "
                    "nnx.update(that, nnx.state(this, AdapterParam)).",
                )
        leaves.setdefault(site.module.path, {}).update(own)
    return tree_of(leaves)


def tree_of(leaves: Mapping[TreePath, Mapping[str, Any]]) -> dict[str, Any]:
    """The leaves of modules by path, as the nested tree of the surgery."""
    tree: dict[str, Any] = {}
    for path, node in leaves.items():
        tree = with_leaves(tree, path, node)
    return tree
