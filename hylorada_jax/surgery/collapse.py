"""Trained adapters as LoRA and DoRA, which any library knows, and back."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.leaves import KINDS, LEAVES, PARTS
from hylorada_jax.math import linear_adapter, low_rank
from hylorada_jax.surgery.layout import tensor_name
from hylorada_jax.surgery.merge import acting_leaves
from hylorada_jax.surgery.modules import subtree
from hylorada_jax.surgery.plan import Site
from hylorada_jax.trees import Constants, Params

_CARRIED = [leaf.name for leaf in LEAVES if leaf.rank_axis is not None]
Tensors = Mapping[str, np.ndarray]


def without(sites: Sequence[Site], tensors: Tensors, parts: Collection[str]) -> dict[str, np.ndarray]:
    """The adapter in which some parts have no effect.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        tensors: as an adapter file holds them.
        parts: of "position_bias", "structure", "daa" and "sparse".

    Returns:
        The same tensors, the leaves that these parts act by set to what is neutral.

    Raises:
        ConfigError: there is no such component.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(
            f"A component that can be dropped is one of {', '.join(PARTS)}.",
            ", ".join(unknown),
            "Correct its name.",
        )
    result = dict(tensors)
    for part, leaf, name in acting_leaves(sites):
        if part in parts:
            key = tensor_name(name, leaf.name)
            result[key] = np.full_like(tensors[key], leaf.neutral)
    return result


def collapse(
    sites: Sequence[Site], tensors: Tensors, params: Params, constants: Constants
) -> dict[str, np.ndarray]:
    """The LoRA or DoRA tensors of every adapted linear layer, which compute the same where p = 1.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        tensors: as an adapter file holds them.
        params: the frozen tree.
        constants: from :func:`hylorada_jax.surgery.build.build_constants`.

    Returns:
        {layer name + "." + leaf}: lora_A, lora_B and, unless the method is LoRA, magnitude.

    Source: method.md §1, Collapse.
    """

    def one(leaves: dict[str, Any], *facts: Any) -> dict[str, Any]:
        return linear_adapter.to_dora(leaves, *facts) if "magnitude" in leaves else leaves

    return _by_layer(one, sites, tensors, params, constants, KINDS["hylorada_v1"])


def vanishing_layers(
    sites: Sequence[Site], tensors: Tensors, params: Params, constants: Constants
) -> list[str]:
    """The adapted linear layers of which a row of W + s·B A is zero, as a padded MLP's are.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`.
        tensors: as an adapter file holds them.
        params: the frozen tree.
        constants: from :func:`hylorada_jax.surgery.build.build_constants`.
    """

    @jax.jit
    def vanishes(leaves: dict[str, Any], weight: Any, norm: Any, scale: Any) -> Any:
        return low_rank.vanishes(weight, norm, leaves["lora_A"], leaves["lora_B"] * scale).any()

    layers = _layers(sites, tensors, params, constants, _CARRIED)
    return [name for name, leaves, *facts in layers if vanishes(leaves, *facts)]


def expand(
    sites: Sequence[Site], tensors: Tensors, params: Params, constants: Constants, config: HyLoRADAConfig
) -> dict[str, np.ndarray]:
    """The HyLoRADA v1 tensors that compute what DoRA's do; the inverse of :func:`collapse`.

    Args:
        sites: from :func:`hylorada_jax.surgery.plan.plan`, for hylorada_v1.
        tensors: lora_A, lora_B and magnitude of every site's layers.
        params: the frozen tree.
        constants: from :func:`hylorada_jax.surgery.build.build_constants`.
        config: its gate_init and residual_init are the gates'.

    Raises:
        ConfigError: at these gates no magnitude has an effect, and so none has DoRA's.

    Source: method.md §1, Collapse.
    """

    def one(leaves: dict[str, Any], *facts: Any) -> dict[str, Any]:
        return linear_adapter.from_dora(
            leaves, *facts, gate_init=config.gate_init, residual_init=config.residual_init
        )

    made = _by_layer(one, sites, tensors, params, constants, KINDS["dora"])
    if not all(np.all(np.isfinite(made[name])) for name in made if name.endswith(".magnitude")):
        raise ConfigError(
            "A magnitude has an effect only where g = σ(gate_init) and 1−β = σ(−residual_init) are not 0.",
            f"gate_init={config.gate_init}, residual_init={config.residual_init}",
            "Take values nearer to 0.",
        )
    return made


def _by_layer(
    function: Callable[..., dict[str, Any]],
    sites: Sequence[Site],
    tensors: Tensors,
    params: Params,
    constants: Constants,
    read: Sequence[str],
) -> dict[str, np.ndarray]:
    """(leaves, W, n₀², s) → leaves, for each layer of the linear adapters."""
    run = jax.jit(function)
    result: dict[str, np.ndarray] = {}
    for name, leaves, *facts in _layers(sites, tensors, params, constants, read):
        made = run(leaves, *facts)
        result |= {f"{name}.{leaf}": np.asarray(value) for leaf, value in made.items()}
        # What is only carried along keeps its bits.
        result |= {f"{name}.{leaf}": tensors[f"{name}.{leaf}"] for leaf in _CARRIED}
    return result


def _layers(
    sites: Sequence[Site], tensors: Tensors, params: Params, constants: Constants, read: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any], Any, Any, float]]:
    """The name, the leaves, W, n₀² and s of each layer of the linear adapters."""
    for site in (site for site in sites if site.component == "linear"):
        norm = subtree(constants, site.module.path)["norm"].reshape(len(site.names), -1)
        for index, name in enumerate(site.names):
            leaves = {
                leaf: jnp.asarray(tensors[f"{name}.{leaf}"]) for leaf in read if f"{name}.{leaf}" in tensors
            }
            weight = site.linear.weight(params, site.layers[index])
            yield name, leaves, weight, norm[index], site.scales[index]
