"""Weights first: what depends on weights alone, computed once for many calls of an NNX model."""

from typing import Any, TypeVar

from flax import nnx

from hylorada_jax.leaves import leaf_of
from hylorada_jax.nnx.adapting import adaptation_of, adapters_of, tree_of
from hylorada_jax.nnx.finding import find_modules
from hylorada_jax.nnx.variables import AdapterParam
from hylorada_jax.surgery import build
from hylorada_jax.surgery import resolve as resolving
from hylorada_jax.surgery.modules import subtree

_Model = TypeVar("_Model", bound=nnx.Module)


def resolve(model: _Model) -> _Model:
    """A model that computes what an adapted one does, its column scales and s·B computed once for all calls.

        c = (1−β)·m/‖W + s·B A‖ + β

    It shares all other variables with the model, and is a function of the model's adapters: inside a loss
    that is called for several microbatches, the gradients of these are added up and pulled back through c
    once. For generation it is made outside of the loop.

    Args:
        model: one that :func:`adapt` was called with.

    Returns:
        A model of its own, to call; what trains and is saved is the one it was made from.

    Raises:
        ModelError: the model is not adapted, or its layers were stacked afterwards.

    Example:
        >>> import jax.numpy as jnp
        >>> from hylorada_jax import HyLoRADAConfig
        >>> from hylorada_jax.nnx import adapt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="dora", target_modules="all-linear"), nnx.Rngs(1))
        >>> once, x = resolve(model), jnp.ones((1, 2))
        >>> bool(jnp.allclose(once(x), model(x)))
        True

    Source: method.md §1.
    """
    adaptation, found = adaptation_of(model)
    sites = [site for site in adaptation.sites if site.component in ("linear", "sparse")]
    config, adapters = adaptation.config, adapters_of(model, adaptation, found)
    raw = {site.module.path: found[site.module.path] for site in sites}
    params = tree_of({path: here.as_matrix(here.leaves()) for path, here in raw.items()})
    constants = build.build_constants(sites, params, config)
    resolved = resolving.resolve(sites, adapters, params, constants, config)
    twin: Any = nnx.clone(model, variables=False)
    there = find_modules(twin)[1]
    for site in sites:
        module, node = there[site.module.path].module, subtree(resolved, site.module.path)
        for leaf in site.leaves:
            delattr(module, leaf)
        for leaf in site.leaves:
            if name := leaf_of(site.component, leaf).resolved:
                setattr(module, name, AdapterParam(node[name], component=site.component))
    twin.hylorada = adaptation.once_resolved
    return twin
