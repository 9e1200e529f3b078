"""The trees of a plan: its constants, and fresh adapters."""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.leaves import Kind, leaf_of
from hylorada_jax.math import linear_adapter, low_rank, sparse, structure
from hylorada_jax.math.quantized import dtype_of
from hylorada_jax.surgery.layout import rank_padding
from hylorada_jax.surgery.modules import require_arrays, subtree, with_leaves
from hylorada_jax.surgery.plan import DROPOUT_RATE, Site
from hylorada_jax.trees import Adapters, Constants, Params


def build_constants(sites: Sequence[Site], params: Params, config: HyLoRADAConfig) -> Constants:
    """The numbers that adapters need and that do not train.

    Numbers, and not parts of a compiled program: models that differ in them alone share one.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        params: the model's parameter tree.
        config: ``lora_dropout`` is read.

    Returns:
        Nested dict: the path of each linear adapter → {"norm": n₀² = ‖W‖² [d_out], "scale": s []}, with an
        axis [layers] in front for a stacked module, in at least float32; and at the top ``DROPOUT_RATE`` [],
        where there is dropout.

    Raises:
        ConfigError: the parameters lie in flax's boxes.
        ModelError: a kernel to adapt holds no floating-point numbers.
    """
    require_arrays(params, "parameters of nn.with_partitioning, or its like")
    linears = [site for site in sites if site.component == "linear"]

    @jax.jit
    def norms(params: Params) -> list[Array]:
        return [map_layers(site, lambda layer, s=site: _norm(s, params, layer)) for site in linears]

    dtype = jnp.promote_types(dtype_of(params), jnp.float32)
    tree: Constants = {DROPOUT_RATE: jnp.asarray(config.lora_dropout, dtype)} if config.lora_dropout else {}
    for site, norm in zip(linears, norms(params), strict=True):
        scales = jnp.asarray(site.scales if site.module.stacked else site.scales[0], norm.dtype)
        tree = with_leaves(tree, site.module.path, {"norm": norm, "scale": scales})
    return tree


def _norm(site: Site, params: Params, layer: Array) -> Array:
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
    if not site.module.stacked:
        return function(0, *arguments)
    return jax.lax.map(lambda slices: function(*slices), (jnp.asarray(site.layers), *arguments))


def build_adapters(
    sites: Sequence[Site], constants: Constants, params: Params, config: HyLoRADAConfig, seed: int = 0
) -> Adapters:
    """The trainable tree of fresh adapters, under which the model computes what it did before.

    A layer's random leaves depend on the seed and on the layer's name alone, not on which other layers are
    adapted. In a stacked module every layer has the largest rank's shape; where a layer's own rank is less,
    the remaining rows of A and columns of B are zero, and so is their gradient.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        constants: from :func:`build_constants`.
        params: the model's parameter tree; unfrozen leaves are copied from it.
        config: kinds and initial values are read.
        seed: of the random leaves.

    Returns:
        Nested dict with the model's paths; leaves named as in method.md, in at least float32. Those of the
        base are as wide as they were, or float32.
    """
    dtype = jnp.promote_types(dtype_of(params), jnp.float32)
    tree: Adapters = {}
    for site in sites:
        if site.component == "unfrozen":
            node = subtree(params, site.module.path)
            # A copy, even where the dtype is right: a training step consumes its adapters.
            own = {leaf: jnp.promote_types(node[leaf].dtype, jnp.float32) for leaf in site.leaves}
            leaves = {leaf: jnp.array(node[leaf], dtype=own[leaf], copy=True) for leaf in site.leaves}
        else:
            names = jnp.asarray([zlib.crc32(name.encode()) for name in site.names], jnp.uint32)
            keys = _keys(jax.random.key(seed), names)
            if site.component == "linear":
                norm = subtree(constants, site.module.path)["norm"].reshape(len(keys), site.linear.d_out)
                leaves = _fresh_linears(site, keys, norm, config)
            else:
                leaves = jax.tree.map(
                    lambda *layers: jnp.stack(layers).astype(dtype),
                    *(
                        _fresh(site, key, dict(shapes), config)
                        for key, shapes in zip(keys, site.shapes, strict=True)
                    ),
                )
            if not site.module.stacked:
                leaves = {name: leaf[0] for name, leaf in leaves.items()}
        tree = with_leaves(tree, site.module.path, leaves)
    return tree


@jax.jit
def _keys(key: Array, names: Array) -> Array:
    return jax.vmap(partial(jax.random.fold_in, key))(names)


def _fresh_linears(site: Site, keys: Array, norms: Array, config: HyLoRADAConfig) -> dict[str, Array]:
    """The leaves of a site's linear adapters, stacked and padded to the largest rank; ranks in turn."""
    kind = config.linear
    assert kind is not None  # there is such a site
    start = {
        "lora_A_init": config.lora_A_init,
        "lora_A_gain": config.lora_A_gain,
        "gate_init": config.gate_init,
        "residual_init": config.residual_init,
        "structure_dim": config.structure_dim,
    }
    ranks = np.asarray(site.ranks)
    groups = [np.flatnonzero(ranks == rank) for rank in dict.fromkeys(site.ranks)]
    batches = [
        _fresh_batch(
            kind,
            site.ranks[i[0]],
            max(site.ranks),
            site.linear.d_in,
            tuple(start.items()),
            keys[i],
            norms[i],
        )
        for i in groups
    ]
    if len(batches) == 1:
        return batches[0]
    order = np.argsort(np.concatenate(groups))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *batches)


# Compiled for what a layer looks like and not for which it is: a model has many layers and few shapes.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _fresh_batch(
    kind: Kind,
    rank: int,
    padded: int,
    d_in: int,
    start: tuple[tuple[str, Any], ...],
    keys: Array,
    norms: Array,
) -> dict[str, Array]:
    def one(key: Array, norm: Array) -> dict[str, Array]:
        leaves = linear_adapter.init_leaves(kind, key, rank, d_in, norm, **dict(start))
        axes = {name: leaf_of("linear", name).rank_axis for name in leaves}
        return {
            name: leaf
            if (axis := axes[name]) is None
            else jnp.pad(leaf, rank_padding(axis, leaf.shape, padded))
            for name, leaf in leaves.items()
        }

    return jax.vmap(one)(keys, norms)


def _fresh(
    site: Site, key: Array, shapes: dict[str, tuple[int, ...]], config: HyLoRADAConfig
) -> dict[str, Array]:
    """The leaves of one layer of another component."""
    match site.component:
        case "sparse":
            units, hidden = shapes["down"]
            return sparse.init_leaves(key, units, hidden)
        case "structure_encoder":
            return structure.init_leaves(key, config.structure_dim, config.structure_encoder_type)
        case "daa" | "position_bias":  # they start as if there were none
            idle = {leaf: leaf_of(site.component, leaf).idle for leaf in shapes}
            return {leaf: jnp.full(shape, idle[leaf], jnp.float32) for leaf, shape in shapes.items()}
        case "linear" | "unfrozen":
            raise AssertionError(site.component)  # build_adapters makes these by itself
        case _:
            assert_never(site.component)
