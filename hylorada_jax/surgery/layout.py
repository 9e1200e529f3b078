"""Adapter trees as flat tensors under HF names, one per layer, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math.linear_adapter import leaf_shapes
from hylorada_jax.surgery.build import Site
from hylorada_jax.surgery.linears import Tree, subtree, with_leaf

# The axis of a leaf that counts the rank; a stacked tree pads it to its largest layer's.
RANK_AXIS = {"lora_A": 0, "lora_B": 1}


def tensor_shapes(sites: Sequence[Site], config: HyLoRADAConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that an adapter file of this plan holds."""
    return {
        f"{name}.{leaf}": shape
        for site in sites
        for name, rank in zip(site.names, site.ranks, strict=True)
        for leaf, shape in leaf_shapes(str(config.linear), rank, site.linear.d_in, site.linear.d_out).items()
    }


def flatten(sites: Sequence[Site], adapters: Tree) -> dict[str, np.ndarray]:
    """The adapters as tensors on the host: stacks taken apart, rank padding removed.

    Args:
        sites: from :func:`plan`.
        adapters: the trainable tree.

    Returns:
        {layer name + "." + leaf name: array}; :func:`unflatten` gives the tree back, bit for bit.
    """
    tensors = {}
    for site in sites:
        for leaf, value in subtree(adapters, site.linear.path).items():
            stack = np.asarray(value) if site.linear.stacked else np.asarray(value)[None]
            for name, rank, layer in zip(site.names, site.ranks, stack, strict=True):
                axis = RANK_AXIS.get(leaf)
                tensors[f"{name}.{leaf}"] = layer if axis is None else layer.take(range(rank), axis=axis)
    return tensors


def unflatten(
    sites: Sequence[Site], tensors: Mapping[str, np.ndarray], config: HyLoRADAConfig
) -> dict[str, Any]:
    """The trainable tree of tensors by name; the inverse of :func:`flatten`.

    Args:
        sites: from :func:`plan`.
        tensors: exactly the names of :func:`tensor_shapes`.
        config: its kind of layer is read.
    """
    tree: dict[str, Any] = {}
    for site in sites:
        leaves = leaf_shapes(str(config.linear), 1, 1, 1)
        stacks = {leaf: _stack(site, leaf, tensors) for leaf in leaves}
        tree = with_leaf(tree, site.linear.path, stacks)
    return tree


def _stack(site: Site, leaf: str, tensors: Mapping[str, np.ndarray]) -> Any:
    layers = []
    for name, rank in zip(site.names, site.ranks, strict=True):
        layer = tensors[f"{name}.{leaf}"]
        if leaf in RANK_AXIS:
            missing = max(site.ranks) - rank
            layer = np.pad(layer, [(0, missing if axis == RANK_AXIS[leaf] else 0) for axis in range(2)])
        layers.append(layer)
    return jnp.asarray(np.stack(layers) if site.linear.stacked else layers[0])
