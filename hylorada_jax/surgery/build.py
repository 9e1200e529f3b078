"""The plan of which layers get which adapter, and the trees built from it."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import NotBuiltError
from hylorada_jax.math import linear_adapter, low_rank
from hylorada_jax.surgery.linears import Linear, Tree, subtree, with_leaf
from hylorada_jax.surgery.targets import layer_ranks, select_targets

# Components of the method that this version does not provide yet, and the setting that asks for each.
NOT_BUILT = {
    "use_hylorada_v2": "the structure-conditioned layer",
    "position_bias_enabled": "the position bias of the Unified layer",
    "daa_enabled": "direct attention adaptation",
    "sparse_enabled": "the sparse MLP adapter",
    "s2_attn_enabled": "shifted sparse attention",
}


@dataclasses.dataclass(frozen=True)
class Site:
    """The adapters of one linear module: which of its layers have one, and of which rank.

    Attributes:
        linear: the module.
        layers: the adapted indices along its stacked axis; (0,) for an unstacked module.
        ranks: the rank of each of these layers.
    """

    linear: Linear
    layers: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapted layers' full names."""
        return tuple(self.linear.names[layer] for layer in self.layers)


def check_built(config: HyLoRADAConfig) -> None:
    """Refuses a component that this version cannot attach, rather than leaving it out in silence.

    Raises:
        NotBuiltError: the config enables such a component.
    """
    for setting, component in NOT_BUILT.items():
        if getattr(config, setting):
            raise NotBuiltError(
                "A configured component must exist in this version",
                f"{component} (method={config.method!r}, {setting}=True)",
                "Use method lora, dora or hylorada_v1, with this setting off.",
            )


def plan(linears: Sequence[Linear], config: HyLoRADAConfig) -> list[Site]:
    """Which layers are adapted, and at which rank.

    Args:
        linears: the model's linear modules, from :func:`find_linears`.
        config: its targets, exclusions and ranks are read.

    Returns:
        One site per module with at least one adapted layer.

    Raises:
        TargetError: a pattern matches nothing.
        NotBuiltError: a component is not provided yet.
    """
    check_built(config)
    names = [name for linear in linears for name in linear.names]
    selected = select_targets(names, config)
    ranks = layer_ranks(selected, names, config)
    sites = []
    for linear in linears:
        layers = tuple(i for i, name in enumerate(linear.names) if name in ranks)
        if layers:
            sites.append(Site(linear, layers, tuple(ranks[linear.names[i]] for i in layers)))
    return sites


def count_parameters(sites: Sequence[Site], config: HyLoRADAConfig) -> int:
    """The number of trainable parameters, from shapes alone (method.md §8).

    A stacked tree pads its layers to the largest rank; the zeros of that padding are not counted.
    """
    return sum(
        math.prod(shape)
        for site in sites
        for rank in site.ranks
        for shape in linear_adapter.leaf_shapes(
            str(config.linear), rank, site.linear.d_in, site.linear.d_out
        ).values()
    )


def build_norms(sites: Sequence[Site], params: Tree) -> dict[str, Any]:
    """The frozen n₀² = ‖W‖² of every adapted layer, congruent to the adapter tree.

    Args:
        sites: from :func:`plan`.
        params: the frozen tree.

    Returns:
        Nested dict, path → n₀² [d_out], or [layers, d_out] for a stacked module; at least float32.
    """

    @jax.jit
    def norms(params: Tree) -> list[Array]:
        return [map_layers(site, lambda layer, s=site: _norm(s, params, layer)) for site in sites]

    tree: dict[str, Any] = {}
    for site, norm in zip(sites, norms(params), strict=True):
        tree = with_leaf(tree, site.linear.path, norm)
    return tree


def _norm(site: Site, params: Tree, layer: Array) -> Array:
    return low_rank.row_norm_squared(site.linear.weight(params, layer))


def map_layers(site: Site, function: Any, *arguments: Any) -> Any:
    """``function(layer, *leaves)`` for every adapted layer of a site, one after another.

    One layer at a time, so that no more than one layer's weight is ever widened to float32.

    Args:
        site: the layers.
        function: (layer index, one layer's slice of each argument) → tree of arrays.
        arguments: trees with a leading axis over the site's layers, when the module is stacked.

    Returns:
        The results, stacked along a leading axis when the module is stacked.
    """
    if not site.linear.stacked:
        return function(0, *arguments)
    return jax.lax.map(lambda slices: function(*slices), (jnp.asarray(site.layers), *arguments))


def build_adapters(
    sites: Sequence[Site], norms: Tree, config: HyLoRADAConfig, seed: int = 0
) -> dict[str, Any]:
    """The trainable tree of fresh adapters, under which the model computes what it did before.

    A layer's initial lora_A depends on the seed and on the layer's name alone, not on which other layers
    are adapted. In a stacked module every layer has the largest rank's shape; where a layer's own rank is
    less, the remaining rows of A and columns of B are zero, and so is their gradient.

    Args:
        sites: from :func:`plan`.
        norms: from :func:`build_norms`.
        config: kind, rank and initial gates are read.
        seed: of lora_A.

    Returns:
        Nested dict with the model's paths; leaves named as in method.md §1.
    """
    tree: dict[str, Any] = {}
    for site in sites:
        norm = subtree(norms, site.linear.path).reshape(len(site.layers), site.linear.d_out)
        names = jnp.asarray([zlib.crc32(name.encode()) for name in site.names], jnp.uint32)
        leaves = _fresh(site, names, norm, config, seed)
        tree = with_leaf(tree, site.linear.path, leaves if site.linear.stacked else _first(leaves))
    return tree


def _first(leaves: dict[str, Array]) -> dict[str, Array]:
    return {name: leaf[0] for name, leaf in leaves.items()}


@partial(jax.jit, static_argnums=(0, 3, 4))
def _fresh(site: Site, names: Array, norms: Array, config: HyLoRADAConfig, seed: int) -> dict[str, Array]:
    """The leaves of a site's layers, stacked; one batch of layers for each rank among them."""

    def one(name: Array, norm: Array, rank: int) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.key(seed), name)
        leaves = linear_adapter.init_leaves(
            str(config.linear),
            key,
            rank,
            site.linear.d_in,
            norm,
            gate_init=config.gate_init,
            residual_init=config.residual_init,
        )
        missing = max(site.ranks) - rank
        return leaves | {
            "lora_A": jnp.pad(leaves["lora_A"], ((0, missing), (0, 0))),
            "lora_B": jnp.pad(leaves["lora_B"], ((0, 0), (0, missing))),
        }

    ranks = np.asarray(site.ranks)
    groups = [np.flatnonzero(ranks == rank) for rank in np.unique(ranks)]
    batches = [jax.vmap(partial(one, rank=int(ranks[i[0]])))(names[i], norms[i]) for i in groups]
    order = np.argsort(np.concatenate(groups))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *batches)
