"""The adapted output where columns are scaled, with a derivative that keeps y alone (method.md §1).

    y = (base + δ)·c;    d(base + δ) = dy·c,   dc = Σ_tokens dy ⊙ y / c

jax's own derivative would keep base + δ too, which is float32 where y is bfloat16. To fold c into W instead
would save the token all of it, but in bfloat16 lose every c within 1/512 of 1: W·c rounds back to W.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from hylorada_jax.math.own_derivative import called
from hylorada_jax.math.remat import named_output

# In place of a scale of 0.
_LEAST = 1e-30


def scaled_sum(
    base: Float[Array, "*tokens d_out"],
    delta: Float[Array, "*tokens d_out"],
    scale: Float[Array, "*own d_out"],
    written: bool = True,
) -> Float[Array, "*tokens d_out"]:
    """y = (base + δ)·c.

    Args:
        base: what the frozen layer gave.
        delta: δ, in at least float32.
        scale: c, in δ's dtype; one for all tokens, or one for each.
        written: y, and its gradient, stand in memory in base's dtype; else the compiler may join to them what
            is before and after.

    Returns:
        y in base's dtype. In bfloat16 the gradient of c sums what is rounded to 8 bits.

    Example:
        >>> scaled_sum(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.array([1.0, 0.5])).tolist()
        [[2.0, 1.0]]

    Source: method.md §1.
    """
    function = functools.partial(_scaled_sum, written)
    return called(function, base, delta, scale, spec=jax.typeof(base).sharding.spec)


def rounded(x: Float[Array, "*any"], dtype: DTypeLike) -> Float[Array, "*any"]:
    """x in a dtype, and where that is narrow no wider copy of it: where what follows widens it again,
    a compiler would leave the rounding out, and move twice the bytes.

    Example:
        >>> rounded(jnp.ones(1), jnp.bfloat16).dtype.name
        'bfloat16'
    """
    narrow = x.astype(dtype)
    return jax.lax.optimization_barrier(narrow) if narrow.dtype.itemsize < 4 else narrow


def nonzero(scale: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """A scale by which its product can be divided, to tell what was scaled.

    Example:
        >>> nonzero(jnp.array([2.0, 0.0])).tolist()[0]
        2.0
    """
    return jnp.where(jnp.abs(scale) < _LEAST, _LEAST, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_sum(written: bool, base: Array, delta: Array, scale: Array) -> Array:
    return _forward(written, base, delta, scale)[0]


def _forward(written: bool, base: Array, delta: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    scale = nonzero(scale)
    y = base.astype(delta.dtype) + delta
    y = y * scale
    y = named_output(rounded(y, base.dtype) if written else y.astype(base.dtype))
    # To jax a new array, to compilers the same. Without it jax.checkpoint keeps y twice where it goes into a
    # checkpoint within, as gate and up do: for this derivative and for that.
    y = jnp.copy(y)
    return y, (y, scale)


def _backward(written: bool, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    y, scale = residuals
    wide = (rounded(g, g.dtype) if written else g).astype(scale.dtype)
    d_sum = rounded(wide * scale, g.dtype)
    d_scale = jnp.sum(wide * y.astype(scale.dtype), axis=tuple(range(g.ndim - scale.ndim))) / scale
    return d_sum, d_sum.astype(scale.dtype), d_scale


_scaled_sum.defvjp(_forward, _backward)
