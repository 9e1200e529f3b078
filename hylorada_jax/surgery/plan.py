"""The plan: which module gets which trainable leaves, from shapes alone."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.leaves import POSITION_BIAS, STRUCTURE_ENCODER, Component, Kind
from hylorada_jax.math import attention, linear_adapter, position, sparse, structure
from hylorada_jax.models.families import that_can
from hylorada_jax.surgery.modules import Holder, Linear, Module, Modules
from hylorada_jax.surgery.targets import (
    ALL_LINEAR,
    layer_alphas,
    layer_ranks,
    left_out,
    mlp_outputs,
    select_targets,
)
from hylorada_jax.text import short

Shapes = Mapping[str, tuple[int, ...]]

# A constant at the top of the resolved tree.
DROPOUT_RATE = "dropout_rate"


@dataclasses.dataclass(frozen=True)
class Site:
    """The trainable leaves that one component has at one module.

    Attributes:
        component: whose leaves they are.
        module: where they are.
        layers: the adapted indices along its stacked axis; (0,) for an unstacked module.
        shapes: (leaf name, shape) of the leaves, for each of these layers.
        scales: s of each of these layers; of linear adapters only.
    """

    component: Component
    module: Module
    layers: tuple[int, ...]
    shapes: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    scales: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapted layers' full names."""
        return tuple(self.module.names[layer] for layer in self.layers)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves."""
        return tuple(dict(self.shapes[0]))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each layer; of linear adapters only."""
        return tuple(dict(shapes)["lora_A"][0] for shapes in self.shapes)

    @property
    def linear(self) -> Linear:
        """The module of a linear adapter."""
        assert isinstance(self.module, Linear)
        return self.module


def plan(modules: Modules, config: HyLoRADAConfig) -> tuple[Site, ...]:
    """Everything that a config trains in a model.

    Args:
        modules: from :func:`hylorada_jax.surgery.modules.find_modules`.
        config: what is adapted, and how.

    Returns:
        The sites, component by component. Warns of what "all-linear" leaves out for its class.

    Raises:
        TargetError: a pattern matches nothing, or there is no MLP whose last layer is known by name.
        ModelError: the model has no attention, embedding or norm that the component could attach to, or a
            module of a name that leaves of the library have.
    """
    _refuse_reserved(modules)
    sites = _linear_sites(modules, config, config.linear) if config.linear else []
    if config.position_bias_enabled:
        place = Module((), ("",), False)
        sites.append(_everywhere(POSITION_BIAS, place, {POSITION_BIAS: (position.NUM_BUCKETS,)}))
    if config.use_hylorada_v2:
        shapes = structure.leaf_shapes(config.structure_dim, config.structure_encoder_type)
        place = Module((STRUCTURE_ENCODER,), (STRUCTURE_ENCODER,), False)
        sites.append(_everywhere(STRUCTURE_ENCODER, place, shapes))
    if config.daa_enabled:
        _require(modules.attentions, "daa_enabled", "self-attention modules that it can reach")
        for module in modules.attentions:
            heads = module.heads if config.daa_per_head else 1
            shapes = attention.leaf_shapes(heads, position_bias=bool(config.daa_position_bias))
            sites.append(_everywhere("daa", module, shapes))
    if config.sparse_enabled:
        sites += _sparse_sites(modules, config)
    unfrozen: list[Holder] = []
    if config.train_embeddings:
        unfrozen += _require(modules.embeddings, "train_embeddings", "embeddings")
    if config.train_norms:
        unfrozen += _require(modules.norms, "train_norms", "norms")
    return (*sites, *(_everywhere("unfrozen", module, dict(module.shapes)) for module in unfrozen))


def _refuse_reserved(modules: Modules) -> None:
    parts = *modules.linears, *modules.attentions, *modules.embeddings, *modules.norms
    for path in (part.path for part in parts):
        if path and path[0] in (POSITION_BIAS, STRUCTURE_ENCODER):
            raise ModelError(
                f"At the top of a model, {POSITION_BIAS} and {STRUCTURE_ENCODER} are leaves of adapters.",
                ".".join(path),
                "Give the module another name.",
            )


def count_parameters(sites: Sequence[Site]) -> int:
    """The number of trainable parameters, from shapes alone (method.md §8).

    A stacked tree pads its layers to the largest rank; the zeros of that padding are not counted.
    """
    return sum(math.prod(shape) for site in sites for shapes in site.shapes for _, shape in shapes)


def _sites(
    component: Component,
    modules: Sequence[Linear],
    adapted: Collection[str],
    shapes_of: Callable[[Linear, str], Shapes],
) -> list[Site]:
    """The sites of those modules that have an adapted layer, by the layers' names."""
    sites = []
    for module in modules:
        layers = tuple(i for i, name in enumerate(module.names) if name in adapted)
        shapes = tuple(tuple(shapes_of(module, module.names[i]).items()) for i in layers)
        if layers:
            sites.append(Site(component, module, layers, shapes))
    return sites


def _everywhere(component: Component, module: Module, shapes: Shapes) -> Site:
    """The site of all layers of a module, which have the same leaves."""
    count = len(module.names)
    return Site(component, module, tuple(range(count)), (tuple(shapes.items()),) * count)


def _linear_sites(modules: Modules, config: HyLoRADAConfig, kind: Kind) -> list[Site]:
    names = modules.linear_names
    selected = select_targets(names, config, heads=not modules.of_base, others=modules.others)
    every = ALL_LINEAR in (config.target_modules or ())
    if every and not modules.of_base and (left := left_out(set(names).difference(selected))):
        warnings.warn(
            f"{ALL_LINEAR} leaves out {short(left)}: by their names output heads or routers. "
            "Name them in target_modules to adapt them too.",
            stacklevel=3,
        )
    if every and modules.others:
        warnings.warn(
            f"{ALL_LINEAR} leaves out {short(modules.others)}: not known to compute y = x · kernel. "
            "A class that does is made known by register_linear, or in NNX by register_einsum.",
            stacklevel=3,
        )
    ranks = layer_ranks(selected, names, config)

    def shapes(module: Linear, name: str) -> Shapes:
        return linear_adapter.leaf_shapes(
            kind, ranks[name], module.d_in, module.d_out, structure_dim=config.structure_dim
        )

    alphas = layer_alphas(ranks, names, config)
    scales = {name: config.scale(ranks[name], alphas[name]) for name in ranks}
    sites = _sites("linear", modules.linears, ranks, shapes)
    return [dataclasses.replace(s, scales=tuple(scales[name] for name in s.names)) for s in sites]


def _sparse_sites(modules: Modules, config: HyLoRADAConfig) -> list[Site]:
    def shapes(module: Linear, name: str) -> Shapes:
        return sparse.leaf_shapes(config.sparse_adapter_dim, module.d_out)

    return _sites("sparse", modules.linears, mlp_outputs(modules.linear_names), shapes)


def _require(modules: Sequence, setting: str, what: str) -> Sequence:
    if not modules:
        raise ModelError(
            f"{setting} needs {what} in the model.",
            "a model without",
            f"Set {setting}=False (a method may have it on), or choose a model of type {that_can('daa')}.",
        )
    return modules
