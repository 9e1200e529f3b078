"""Modules that qwix has quantised: their kernels, and arithmetic beside them that it leaves alone."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array

from hylorada_jax import trees
from hylorada_jax.errors import ModelError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_quantized(variable: Any) -> bool:
    """Whether a module's kernel is qwix's, and no ``nnx.Variable``."""
    return not isinstance(variable, nnx.Variable) and trees.is_quantized(getattr(variable, "array", None))


def value_of(variable: Any) -> Any:
    """The array that a variable holds, or qwix's array of codes and scales."""
    if not is_quantized(variable):
        return variable[...]
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return jax.tree.map(lambda leaf: leaf[...], variable.array, is_leaf=is_variable)


def numbers(value: Any) -> Array:
    """The numbers of what :func:`value_of` gives."""
    if not trees.is_quantized(value):
        return value
    import qwix  # type: ignore[import-untyped]

    return qwix.dequantize(value)


def untouched(function: _Function) -> _Function:
    """The function, in which qwix replaces no product.

    A quantised model's call replaces those of all functions below it, and would quantise A and B too. qwix
    has no public way to ask for that.

    Raises:
        ModelError: qwix is imported, and in this version of it the way is another.
    """
    if sys.modules.get("qwix") is None:
        return function
    try:
        from qwix._src.interception import disable_interceptions  # type: ignore[import-untyped]
    except ImportError as error:
        raise ModelError(
            "qwix must leave the products of adapters as they are, and has no public way to ask for that.",
            f"a qwix without the private way that is known here: {error}",
            "Install one that has it, `pip install qwix==0.1.8`, or do not import qwix.",
        ) from error
    return disable_interceptions(function)
