"""Folding trained adapters into the weights."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.leaves import PARTS, Leaf, Part, leaf_of
from hylorada_jax.math import low_rank
from hylorada_jax.math.quantized import plain
from hylorada_jax.surgery.layout import flatten, tensor_name
from hylorada_jax.surgery.modules import subtree, with_leaves
from hylorada_jax.surgery.plan import Site
from hylorada_jax.trees import Adapters, Params, Resolved, Tree


def acting_leaves(sites: Sequence[Site]) -> Iterator[tuple[Part, Leaf, str]]:
    """(part, leaf, layer's name) of every leaf by which a part acts that no weights can express."""
    for site in sites:
        for leaf in (leaf_of(site.component, name) for name in site.leaves):
            if leaf.part is not None:
                yield from ((leaf.part, leaf, name) for name in site.names)


def live_parts(sites: Sequence[Site], tensors: Mapping[str, np.ndarray]) -> dict[Part, str]:
    """The parts that have an effect which no weights can express.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        tensors: as an adapter file holds them, from :func:`hylorada_jax.surgery.layout.flatten`.

    Returns:
        {"position_bias", "structure", "daa" or "sparse": the first leaf that is not exactly neutral}.

    Source: method.md §1, Merging.
    """
    live: dict[Part, str] = {}
    for part, leaf, name in acting_leaves(sites):
        if part not in live and not np.all(tensors[tensor_name(name, leaf.name)] == leaf.neutral):
            live[part] = f"{leaf.name} of {name or 'the model'} is not {leaf.neutral}"
    return live


def check_mergeable(sites: Sequence[Site], adapters: Adapters) -> None:
    """Refuses adapters that no weights can express: a token's own update, attention's, an MLP's.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        adapters: the trainable tree.

    Raises:
        ModelError: a part is not exactly neutral; the message names it.

    Source: method.md §1, Merging.
    """
    refuse_live(live_parts(sites, flatten(sites, adapters)))


def refuse_live(live: Mapping[Part, str]) -> None:
    """Raises the error that names every part of :func:`live_parts`, if there is one."""
    if live:
        raise ModelError(
            "Only an update of the weights themselves can be merged into them.",
            "; ".join(f"{PARTS[part]}: {found}" for part, found in live.items()),
            "Keep the adapter beside the model, or train without this component.",
        )


def merge(sites: Sequence[Site], resolved: Resolved, params: Params, config: HyLoRADAConfig) -> Params:
    """The parameter tree of an ordinary model that computes what the adapted one does.

        W' = c ⊙ (W + s·B A)          (and bias' = c ⊙ bias when the magnitude scales the bias)

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`; :func:`check_mergeable` holds.
        resolved: from :func:`hylorada_jax.surgery.resolve.resolve`.
        params: the model's whole tree; left as it is, its other leaves shared with the result.
        config: ``magnitude_scales_bias`` is read.

    Returns:
        A new tree of the same structure and dtypes, in which no kernel is quantised; each weight is computed
        in at least float32 and rounded once.

    Source: method.md §1, Merging.
    """
    params = plain(params)
    merged = dict(params)
    for site in sites:
        path = site.module.path
        match site.component:
            case "linear":
                adapter = {
                    leaf: value
                    for leaf, value in subtree(resolved, path).items()
                    if leaf in ("lora_A", "scaled_B", "column_scale")
                }
                leaves = _merge_site(site, adapter, subtree(params, path), config.magnitude_scales_bias)
                merged = with_leaves(merged, path, leaves)
            case "unfrozen":
                old, new = subtree(params, path), subtree(resolved, path)
                leaves = {leaf: new[leaf].astype(old[leaf].dtype) for leaf in site.leaves}
                merged = with_leaves(merged, path, leaves)
            case "position_bias" | "structure_encoder" | "daa" | "sparse":
                pass  # neutral, by check_mergeable
            case _:
                assert_never(site.component)
    return merged


@partial(jax.jit, static_argnums=(0, 3))
def _merge_site(site: Site, adapter: Tree, leaves: Tree, scales_bias: bool) -> dict[str, Array]:
    linear = site.linear
    out_in = linear.kernel_is_out_in

    def one(slices: tuple[Array, Tree]) -> Array:
        kernel, adapter = slices
        weight = low_rank.merged_weight(
            kernel if out_in else kernel.reshape(linear.d_in, linear.d_out).T,
            adapter["lora_A"],
            adapter["scaled_B"],
            adapter.get("column_scale"),
        )
        return weight if out_in else weight.T.reshape(kernel.shape)

    slices = (leaves["kernel"], dict(adapter))
    for _ in range(linear.stacked + (linear.experts is not None)):
        one = partial(jax.lax.map, one)
    result = dict(leaves) | {"kernel": one(slices)}
    if scales_bias and "bias" in leaves and "column_scale" in adapter:
        wide = leaves["bias"].astype(jnp.promote_types(leaves["bias"].dtype, jnp.float32))
        result["bias"] = (wide * adapter["column_scale"].reshape(wide.shape)).astype(leaves["bias"].dtype)
    return result
