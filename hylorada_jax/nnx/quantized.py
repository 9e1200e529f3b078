"""Modules that qwix has quantised: their kernels, and arithmetic beside them that it leaves alone."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array

from hylorada_jax.math import quantized

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_quantized(variable: Any) -> bool:
    """Whether a module's kernel is qwix's, and no ``nnx.Variable``."""
    return not isinstance(variable, nnx.Variable) and quantized.is_quantized(getattr(variable, "array", None))


def value_of(variable: Any) -> Any:
    """The array that a variable holds, or qwix's array of codes and scales."""
    if not is_quantized(variable):
        return variable[...]
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return jax.tree.map(lambda leaf: leaf[...], variable.array, is_leaf=is_variable)


def numbers(value: Any) -> Array:
    """The numbers of what :func:`value_of` gives."""
    if not quantized.is_quantized(value):
        return value
    import qwix  # type: ignore[import-untyped]

    return qwix.dequantize(value)


def untouched(function: _Function) -> _Function:
    """The function, in which qwix replaces no product.

    A quantised model's call replaces those of all functions below it, and would quantise A and B too. qwix
    has no public way to ask for that.
    """
    interception = sys.modules.get("qwix._src.interception")
    return function if interception is None else interception.disable_interceptions(function)
