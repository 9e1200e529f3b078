"""Folding trained adapters into the weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math import low_rank
from hylorada_jax.surgery.build import Site
from hylorada_jax.surgery.linears import Tree, subtree, with_leaf


def merge(sites: Sequence[Site], resolved: Tree, params: Tree, config: HyLoRADAConfig) -> dict[str, Any]:
    """The parameter tree of an ordinary model that computes what the adapted one does.

        W' = c ⊙ (W + s·B A)          (and bias' = c ⊙ bias when the magnitude scales the bias)

    Args:
        sites: from :func:`plan`.
        resolved: from :func:`resolve`.
        params: the frozen tree; left as it is, its other leaves shared with the result.
        config: ``magnitude_scales_bias`` is read.

    Returns:
        A new tree of the same structure and dtypes; each weight is computed in at least float32 and
        rounded once.

    Source: method.md §1, Merging.
    """
    merged: dict[str, Any] = dict(params)
    for site in sites:
        path = site.linear.path
        leaves = _merge_site(
            site, subtree(resolved, path), subtree(params, path), config.magnitude_scales_bias
        )
        merged = with_leaf(merged, path, leaves)
    return merged


@partial(jax.jit, static_argnums=(0, 3))
def _merge_site(site: Site, adapter: Tree, leaves: Tree, scales_bias: bool) -> dict[str, Array]:
    out_in = site.linear.kernel_is_out_in

    def one(slices: tuple[Array, Tree]) -> Array:
        kernel, adapter = slices
        weight = low_rank.merged_weight(
            kernel if out_in else kernel.T, adapter["lora_A"], adapter["lora_B"], adapter.get("column_scale")
        )
        return weight if out_in else weight.T

    slices = (leaves["kernel"], dict(adapter))
    result = dict(leaves) | {"kernel": jax.lax.map(one, slices) if site.linear.stacked else one(slices)}
    if scales_bias and "bias" in leaves and "column_scale" in adapter:
        wide = leaves["bias"].astype(jnp.promote_types(leaves["bias"].dtype, jnp.float32))
        result["bias"] = (wide * adapter["column_scale"]).astype(leaves["bias"].dtype)
    return result
