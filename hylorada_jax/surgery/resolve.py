"""Weights first: what the adapters amount to, computed once per optimizer step."""

from collections.abc import Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.leaves import leaf_at
from hylorada_jax.math import linear_adapter, sparse
from hylorada_jax.math.adapted_norm import KEPT
from hylorada_jax.placement.shards import cut
from hylorada_jax.surgery.build import map_layers
from hylorada_jax.surgery.modules import Linear, subtree, with_leaves
from hylorada_jax.surgery.plan import DROPOUT_RATE, Site
from hylorada_jax.trees import Adapters, Constants, Params, Resolved, Tree


def resolve(
    sites: Sequence[Site], adapters: Adapters, params: Params, constants: Constants, config: HyLoRADAConfig
) -> Resolved:
    """The resolved tree: all of the adapters that depends on weights only, which the forward pass reads.

        c = (1−β)·m/‖W + s·B A‖ + β          (absent for LoRA, where c = 1)

    A pure function of weights: call it outside the microbatch loop and outside rematerialisation, and pull
    the summed gradient of its result back once. The adapters of a stacked module cover all its layers: a
    layer that is not adapted gets zeros, and c = 1.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        adapters: the trainable tree.
        params: the frozen tree; read, never copied or differentiated.
        constants: from :func:`hylorada_jax.surgery.build.build_constants`.
        config: ``detach_norm`` and the sparse adapter's gate are read.

    Returns:
        Nested dict with the model's paths. Linear adapters: lora_A, scaled_B, column_scale, and the
        factors of what depends on the token; sparse adapters: down, up, mask; unfrozen leaves, the
        dropout rate and all else as it is. In at least float32, as is the gradient that microbatches add up.

    Raises:
        ModelError: the adapters have another rank than the sites.

    Source: method.md §1, §4.
    """
    tree: Resolved = {}
    if DROPOUT_RATE in constants:
        tree[DROPOUT_RATE] = constants[DROPOUT_RATE]
    for site in sites:
        node = subtree(adapters, site.module.path)
        leaves = {leaf: node[leaf] for leaf in site.leaves}
        match site.component:
            case "linear":
                leaves = _linear(site, leaves, params, subtree(constants, site.module.path), config)
            case "sparse":
                leaves = _spread(site, _sparse(site, leaves, config))
            case "position_bias" | "structure_encoder" | "daa" | "unfrozen":
                pass  # read as they are
            case _:
                assert_never(site.component)
        tree = with_leaves(tree, site.module.path, leaves)
    return tree


def _linear(
    site: Site, leaves: dict[str, Array], params: Params, constants: Tree, config: HyLoRADAConfig
) -> dict[str, Array]:
    if (rank := leaves["lora_A"].shape[-2]) != max(site.ranks):
        raise ModelError(
            "Adapters have the rank that the model was adapted with, which their scale α/r goes by.",
            f"{site.names[0]}: rank {rank}, where the model has {max(site.ranks)}",
            "Give this model's own, or adapt a model with their config.",
        )

    def one(layer: Array, leaves: Any, norm: Array, scale: Array) -> dict[str, Array]:
        weight = site.linear.reader(params, layer)
        # On a mesh the weight stays where it is: what is small goes to it.
        leaves, norm = jax.tree.map(cut, (leaves, norm))
        return linear_adapter.resolve_leaves(
            leaves, weight, norm, scale, detach_norm=bool(config.detach_norm)
        )

    if site.module.stacked:
        # All else that the backward pass needs are the weights, which would be copied for all layers.
        one = jax.checkpoint(one, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
        return _spread(site, map_layers(site, one, leaves, constants["norm"], constants["scale"]))
    return one(jnp.asarray(0), leaves, constants["norm"], constants["scale"])


def _sparse(site: Site, leaves: dict[str, Array], config: HyLoRADAConfig) -> dict[str, Array]:
    k = sparse.units_on(config.sparse_topk_ratio, config.sparse_adapter_dim)

    def mask(scores: Array) -> Array:
        return sparse.topk_mask(scores, k, config.sparse_temperature)

    scores = leaves["gate_scores"]
    masks = jax.vmap(mask)(scores) if site.module.stacked else mask(scores)
    return {"down": leaves["down"], "up": leaves["up"], "mask": masks}


def _spread(site: Site, resolved: dict[str, Array]) -> dict[str, Array]:
    """The leaves of the adapted layers, put at their places among all layers of the stacked module."""
    count = len(site.module.names)
    if not site.module.stacked:
        return resolved
    if len(site.layers) == count:
        return {name: _by_expert(site, leaf) for name, leaf in resolved.items()}

    def spread(name: str, leaf: Array) -> Array:
        row = leaf_at((name,), resolved=True)
        assert row is not None, name
        idle = jnp.full((count, *leaf.shape[1:]), row.idle, leaf.dtype)
        return _by_expert(site, idle.at[jnp.asarray(site.layers)].set(leaf))

    return {name: spread(name, leaf) for name, leaf in resolved.items()}


def _by_expert(site: Site, leaf: Array) -> Array:
    """A leaf of all a module's names, with an axis of experts behind the layers, where it has them."""
    experts = site.module.experts if isinstance(site.module, Linear) else None
    return leaf if experts is None else leaf.reshape(-1, experts, *leaf.shape[1:])
