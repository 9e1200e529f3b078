"""Flax's linear layer, with a kernel that may be quantised, and products with a number."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from hylorada_jax.math import quantized
from hylorada_jax.math.quantized import Kernel
from hylorada_jax.math.remat import named_output
from hylorada_jax.trees import is_quantized


def promote_dtype(
    x: Array, kernel: Kernel, bias: Array | None, *, dtype: DTypeLike | None = None, inexact: bool = True
) -> list[Any]:
    """Flax's ``promote_dtype`` for a kernel that may be quantised."""
    given = kernel.scale if is_quantized(kernel) else kernel
    x, promoted, bias = nn.dtypes.promote_dtype(x, given, bias, dtype=dtype, inexact=inexact)
    return [x, kernel.astype(promoted.dtype) if is_quantized(kernel) else promoted, bias]


def dot_general(x: Array, kernel: Kernel, dimensions: Any, **settings: Any) -> Array:
    """The product of a layer without an adapter, which a rematerialised layer may keep."""
    return named_output(quantized.dot_general(x, kernel, dimensions, **settings))


Dense = partial(nn.Dense, promote_dtype=promote_dtype, dot_general=dot_general)


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """x · factor, rounded once, as PyTorch multiplies by a Python number; x itself where it is 1."""
    if factor == 1:
        return x
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor).astype(x.dtype)
