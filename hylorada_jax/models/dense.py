"""Flax's linear layer, with a kernel that may be quantised."""

from functools import partial
from typing import Any

import flax.linen as nn
from jax import Array
from jax.typing import DTypeLike

from hylorada_jax.math.quantized import Kernel, dot_general, is_quantized


def promote_dtype(
    x: Array, kernel: Kernel, bias: Array | None, *, dtype: DTypeLike | None = None, inexact: bool = True
) -> list[Any]:
    """Flax's ``promote_dtype`` for a kernel that may be quantised."""
    given = kernel.scale if is_quantized(kernel) else kernel
    x, promoted, bias = nn.dtypes.promote_dtype(x, given, bias, dtype=dtype, inexact=inexact)
    return [x, kernel.astype(promoted.dtype) if is_quantized(kernel) else promoted, bias]


Dense = partial(nn.Dense, promote_dtype=promote_dtype, dot_general=dot_general)
