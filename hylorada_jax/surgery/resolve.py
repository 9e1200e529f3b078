"""Weights first: what the adapters amount to, computed once per optimizer step."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math import linear_adapter
from hylorada_jax.surgery.build import Site, map_layers
from hylorada_jax.surgery.linears import Tree, subtree, with_leaf


def resolve(
    sites: Sequence[Site], adapters: Tree, params: Tree, norms: Tree, config: HyLoRADAConfig
) -> dict[str, Any]:
    """The resolved tree: A, s·B and c of every adapted module, all that the forward pass reads.

        c = (1−β)·m/‖W + s·B A‖ + β          (absent for LoRA, where c = 1)

    A pure function of weights: call it outside the microbatch loop and outside rematerialisation, and pull
    the summed gradient of its result back once. The adapters of a stacked module cover all its layers: a
    layer that is not adapted gets A = B = 0 and c = 1.

    Args:
        sites: from :func:`plan`.
        adapters: the trainable tree.
        params: the frozen tree; read, never copied or differentiated.
        norms: n₀² of every site, from :func:`build_norms`.
        config: scale and ``detach_norm`` are read.

    Returns:
        Nested dict with the model's paths; leaves lora_A, lora_B (times s) and column_scale.

    Source: method.md §1.
    """
    tree: dict[str, Any] = {}
    for site in sites:
        leaves, norm = subtree(adapters, site.linear.path), subtree(norms, site.linear.path)
        scales = jnp.asarray([config.scale(rank) for rank in site.ranks], norm.dtype)

        def one(layer: Array, leaves: Any, norm: Array, scale: Array, site: Site = site) -> dict[str, Array]:
            weight = site.linear.weight(params, layer)
            return linear_adapter.resolve_leaves(
                leaves, weight, norm, scale, detach_norm=bool(config.detach_norm)
            )

        if site.linear.stacked:
            resolved = _spread(site, map_layers(site, one, leaves, norm, scales))
        else:
            resolved = one(jnp.asarray(0), leaves, norm, scales[0])
        tree = with_leaf(tree, site.linear.path, resolved)
    return tree


def _spread(site: Site, resolved: dict[str, Array]) -> dict[str, Array]:
    """The leaves of the adapted layers, put at their places among all layers of the stacked module."""
    count = len(site.linear.names)
    if len(site.layers) == count:
        return resolved

    def spread(name: str, leaf: Array) -> Array:
        idle = jnp.ones if name == "column_scale" else jnp.zeros
        return idle((count, *leaf.shape[1:]), leaf.dtype).at[jnp.asarray(site.layers)].set(leaf)

    return {name: spread(name, leaf) for name, leaf in resolved.items()}
