"""Adapter trees as flat tensors under HF names, one per layer, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hylorada_jax.errors import CheckpointError, ModelError
from hylorada_jax.leaves import LEAVES, leaf_of
from hylorada_jax.placement.processes import whole
from hylorada_jax.surgery.modules import subtree, with_leaves
from hylorada_jax.surgery.plan import Site
from hylorada_jax.text import short
from hylorada_jax.trees import Adapters

_IN_FILE = {leaf.name: leaf.in_file for leaf in LEAVES}


def tensor_shapes(sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that an adapter file of this plan holds."""
    return {
        tensor_name(name, leaf): shape
        for site in sites
        for name, shapes in zip(site.names, site.shapes, strict=True)
        for leaf, shape in shapes
    }


def tensor_name(name: str, leaf: str) -> str:
    """A leaf's name in a file.

    Example:
        >>> tensor_name("model.norm", "scale"), tensor_name("", "position_bias")
        ('model.norm.weight', 'position_bias')
    """
    return f"{name}.{_IN_FILE[leaf]}".removeprefix(".")


def flatten(sites: Sequence[Site], adapters: Adapters) -> dict[str, np.ndarray]:
    """The adapters as tensors on the host: stacks taken apart, rank padding removed.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        adapters: the trainable tree.

    Returns:
        {layer name + "." + leaf name: array}; :func:`unflatten` gives the tree back, bit for bit.

    Raises:
        ModelError: a leaf has another shape than the sites say.
    """
    tensors = {}
    for site in sites:
        node = subtree(adapters, site.module.path)
        for leaf in site.leaves:
            value, axis = whole(node[leaf]), leaf_of(site.component, leaf).rank_axis
            stack = value if site.module.stacked else value[None]
            for name, shapes, layer in zip(site.names, site.shapes, stack, strict=True):
                shape = dict(shapes)[leaf]
                cut = (slice(n if place == axis else None) for place, n in enumerate(shape[: layer.ndim]))
                tensors[tensor_name(name, leaf)] = tensor = layer[(*cut,)]
                if tensor.shape != shape:
                    raise ModelError(
                        "A leaf has the shape that the model was adapted with; a stack pads its rank alone.",
                        f"{tensor_name(name, leaf)} {layer.shape} for {shape}",
                        "Give the adapters of this model and config.",
                    )
    return tensors


def unflatten(sites: Sequence[Site], tensors: Mapping[str, np.ndarray]) -> Adapters:
    """The trainable tree of tensors by name; the inverse of :func:`flatten`.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        tensors: exactly those of :func:`tensor_shapes`.

    Raises:
        CheckpointError: their names or shapes are others; both sides are listed.
    """
    check_keys({name: tensor.shape for name, tensor in tensors.items()}, tensor_shapes(sites))
    tree: Adapters = {}
    for site in sites:
        stacks = {leaf: _stack(site, leaf, tensors) for leaf in site.leaves}
        tree = with_leaves(tree, site.module.path, stacks)
    return tree


def _stack(site: Site, leaf: str, tensors: Mapping[str, np.ndarray]) -> Any:
    layers = [tensors[tensor_name(name, leaf)] for name in site.names]
    if (axis := leaf_of(site.component, leaf).rank_axis) is not None:
        layers = [np.pad(layer, rank_padding(axis, layer.shape, max(site.ranks))) for layer in layers]
    return jnp.asarray(np.stack(layers) if site.module.stacked else layers[0])


def rank_padding(axis: int, shape: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """What to pad a leaf with so that its axis of the rank has that length.

    Example:
        >>> rank_padding(1, (4, 2), 3)
        [(0, 0), (0, 1)]
    """
    return [(0, rank - length if place == axis else 0) for place, length in enumerate(shape)]


def check_keys(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the tensors of a file with those the model needs, by name and shape.

    Raises:
        CheckpointError: they differ; both sides are listed.
    """
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    shapes = [
        f"{n} {found[n]} for {wanted[n]}" for n in sorted(set(found) & set(wanted)) if found[n] != wanted[n]
    ]
    if missing or extra or shapes:
        raise CheckpointError(
            "The adapter's tensors must be those that the model and the config call for.",
            f"missing {short(missing)}; unexpected {short(extra)}; of another shape {short(shapes)}",
            "Load it on the base model it was trained on.",
        )
