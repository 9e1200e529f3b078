"""Adapters of an NNX model folded into its weights, switched off, and taken off."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.nnx.adapted import Adapted, plain_class, set_class
from hylorada_jax.nnx.adapting import (
    ASIDE,
    Adaptation,
    adaptation_of,
    adapters_of,
    changed_modules,
    known_adaptation,
    module_of,
    own_attributes,
    tree_of,
)
from hylorada_jax.nnx.finding import Found
from hylorada_jax.nnx.quantized import is_quantized
from hylorada_jax.surgery import build
from hylorada_jax.surgery import merge as merging
from hylorada_jax.surgery.modules import subtree
from hylorada_jax.surgery.plan import Site
from hylorada_jax.surgery.resolve import resolve
from hylorada_jax.trees import Adapters, TreePath

_Model = TypeVar("_Model", bound=nnx.Module)


def merge(model: _Model) -> _Model:
    """Folds the adapters into the weights, in place: a plain model that computes what the adapted one did.

        W' = c ⊙ (W + s·B A)

    Args:
        model: one that :func:`adapt` was called with.

    Returns:
        The same model, its modules of their own classes again, with no adapter on it.

    Raises:
        ModelError: it is not adapted, its layers were stacked afterwards, a sparse adapter has learnt
            something, or a kernel that is adapted has a second place in the model, or is quantised.

    Example:
        >>> from hylorada_jax.nnx import AdapterParam, adapt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="lora", target_modules="all-linear"), nnx.Rngs(1))
        >>> len(nnx.state(merge(model), AdapterParam))
        0

    Source: method.md §1, Merging.
    """
    adaptation, found = adaptation_of(model)
    config, adapters = adaptation.config, adapters_of(model, adaptation, found)
    merging.check_mergeable(adaptation.sites, adapters)
    _refuse_unmergeable(model, adaptation, found)
    for site in adaptation.sites:  # one after another: no second copy of all weights
        here, path = found[site.module.path], site.module.path
        if site.component == "linear":
            _merge_linear(site, here, adapters, config)
        elif site.component == "unfrozen":
            for leaf in site.leaves:
                variable = getattr(here.module, leaf)
                if not variable.has_metadata("base"):
                    continue  # merged with a module before, which shares it
                cls, dtype = variable.get_metadata("base")
                variable.set_value(subtree(adapters, path)[leaf].astype(dtype))
                variable.del_metadata("base")
                variable.del_metadata("component")
                set_class(variable, cls)
    _strip(model, adaptation, found)
    return model


def _merge_linear(site: Site, here: Found, adapters: Adapters, config: HyLoRADAConfig) -> None:
    params = tree_of({site.module.path: here.as_matrix(here.leaves())})
    constants = build.build_constants((site,), params, config)
    resolved = resolve((site,), adapters, params, constants, config)
    merged = subtree(merging.merge((site,), resolved, params, config), site.module.path)
    assert here.form is not None
    _replace(here.kernel, here.form.kernel_of(merged["kernel"], here.kernel.shape))
    if config.magnitude_scales_bias and "bias" in merged:
        _replace(here.module.bias, merged["bias"].reshape(here.module.bias.shape))


def _replace(variable: Any, value: Array) -> None:
    """Gives a variable another value where the one before lies: the compiler may have put it everywhere."""
    place = None if isinstance(value, jax.core.Tracer) else getattr(variable[...], "sharding", None)
    variable.set_value(jax.device_put(value, place) if isinstance(place, NamedSharding) else value)


def _refuse_unmergeable(model: Any, adaptation: Adaptation, found: Mapping[TreePath, Found]) -> None:
    paths = {site.module.path for site in adaptation.sites if site.component == "linear"}
    if codes := [".".join(path) for path in sorted(paths) if is_quantized(found[path].kernel)]:
        raise ModelError(
            "A kernel is merged where it is an array of floats.",
            f"{', '.join(codes[:4])}, quantised by qwix",
            "Save the adapter, and load it onto the model as it was before it was quantised.",
        )
    merged = {(*path, leaf) for path in paths for leaf in found[path].kind.leaves}
    # Whoever holds it may read it, such as a model whose embedding is its head's kernel.
    for places in nnx.find_duplicates(model, only=nnx.Variable):
        held = [tuple(map(str, place)) for place in places]
        if merged & {*held}:
            raise ModelError(
                "A kernel is merged where one module alone reads it.",
                f"{' and '.join(map('.'.join, held))}, which are one",
                "Keep the adapter beside the model, or give each module a kernel of its own first.",
            )


@contextlib.contextmanager
def disabled(model: _Model) -> Iterator[_Model]:
    """A context in which an adapted model computes what it did before it was adapted.

    Args:
        model: one that :func:`adapt` was called with.

    Raises:
        ModelError: it is not adapted, or embeddings or norms themselves have trained.

    Example:
        >>> from hylorada_jax.nnx import adapt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="lora", target_modules="all-linear"), nnx.Rngs(1))
        >>> with disabled(model):
        ...     type(model.layers[0]).__name__
        'Linear'
    """
    adaptation, found = adaptation_of(model)
    _refuse_trained(adaptation)
    modules = {id(module): module for module in _adapted(model, found)}
    classes = {key: type(module) for key, module in modules.items()}
    for module in modules.values():
        set_class(module, plain_class(type(module)))
    try:
        yield model
    finally:
        # What was merged or unloaded within, and perhaps adapted anew, has the classes that it should have.
        now = known_adaptation(model)
        if now is not None and now.sites is adaptation.sites:
            for key, module in modules.items():
                set_class(module, classes[key])


def unload(model: _Model) -> _Model:
    """Takes the adapters off a model, in place; what they have learnt is lost.

    Args:
        model: one that :func:`adapt` was called with.

    Returns:
        The same model, as it was before.

    Raises:
        ModelError: it is not adapted, or embeddings or norms themselves have trained.

    Example:
        >>> from hylorada_jax.nnx import adapt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="lora", target_modules="all-linear"), nnx.Rngs(1))
        >>> type(unload(model).layers[0]).__name__
        'Linear'
    """
    adaptation, found = adaptation_of(model)
    _refuse_trained(adaptation)
    _strip(model, adaptation, found)
    return model


def _strip(model: Any, adaptation: Adaptation, found: Mapping[TreePath, Found]) -> None:
    """Takes off all that was put on: by what was adapted, for disabled modules have their plain classes."""
    for site in adaptation.sites:
        for name in own_attributes(site):
            delattr(module_of(model, found, site), name)
    for here in changed_modules(adaptation.config, adaptation.sites, found).values():
        for name in ASIDE:
            if hasattr(here.module, name):
                delattr(here.module, name)
        set_class(here.module, plain_class(type(here.module)))
    set_class(model, plain_class(type(model)))
    del model.hylorada


def _adapted(model: Any, found: Mapping[TreePath, Found]) -> list[Any]:
    modules = (model, *(here.module for here in found.values()))
    return [module for module in modules if isinstance(module, Adapted)]


def _refuse_trained(adaptation: Adaptation) -> None:
    if trained := [".".join(s.module.path) for s in adaptation.sites if s.component == "unfrozen"]:
        raise ModelError(
            "What is taken off has left the base's own variables alone.",
            f"{', '.join(trained[:4])}, which trained themselves",
            "Merge the adapters, or load the base anew.",
        )
