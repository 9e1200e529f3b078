"""‖W + s·B A‖² of every row, also where the update all but removes the row (method.md §1)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.lax import Precision
from jax.sharding import PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Float

from hylorada_jax.math.own_derivative import called

# n² is a sum whose terms may cancel; their rounding stays, a few units in the last place of the terms. A row
# left with less than this part of them is computed directly. The others are off by 3e-6 of n at most.
_CANCELLED = 1 / 16

KEPT = "adapted norm"
"""The name, for ``jax.checkpoint``, of what makes up for W in the backward pass, but for one product."""


def adapted_norm_squared(
    weight: Float[Array, "d_out d_in"] | Partial,
    initial: Float[Array, " d_out"],
    lora_A: Float[Array, "r d_in"],
    scaled_B: Float[Array, "d_out r"],
) -> Float[Array, " d_out"]:
    """n² = ‖W + s·B A‖² of every row, without forming B A unless a row all but vanishes.

        n² = n₀² + 2·Σ_r (W Aᵀ ⊙ sB) + Σ_r (sB (A Aᵀ) ⊙ sB)

    Where the update takes most of a row away these terms cancel, and the square of what is left drowns in
    their rounding: at n = ‖W‖/1000 float32 is 10 % off. Such rows are noticed. If there is one, its n² is
    summed over W + s·B A itself, and the gradient is taken from there: the error then grows with ‖W‖/n and
    not with its square. A step without such rows pays nothing.

    Args:
        weight: W, or what gives it from arrays, where it is read: so that no copy of it is made for the
            formula that all but never runs. Such a W has no gradient.
        initial: n₀² = ‖W‖², in A's dtype.
        lora_A: A, float32 or wider.
        scaled_B: s·B, in A's dtype.

    Returns:
        n² in A's dtype; rounding may have made it slightly negative.

    Example:
        >>> W, A, B = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[4.0]])
        >>> adapted_norm_squared(W, jnp.array([9.0]), A, B).tolist()
        [25.0]

    Source: Liu et al. 2024 (DoRA), eq. 5, expanded.
    """
    return called(_norm_squared, weight, initial, lora_A, scaled_B, spec=PartitionSpec())


# Its own derivative: through a choice between two formulas jax would keep what either of them needs.
@jax.custom_vjp
def _norm_squared(weight: Array | Partial, initial: Array, lora_A: Array, scaled_B: Array) -> Array:
    return _forward(weight, initial, lora_A, scaled_B)[0]


def _forward(weight: Array | Partial, initial: Array, lora_A: Array, scaled_B: Array) -> tuple[Array, tuple]:
    cross = _product(_read(weight, lora_A), lora_A.T)
    gram = _product(lora_A, lora_A.T)
    square = _product(scaled_B, gram)
    squared = initial + jnp.sum((2 * cross + square) * scaled_B, axis=-1)
    sizes = _product(jnp.abs(scaled_B), jnp.abs(gram)) * jnp.abs(scaled_B)
    cancelled = squared < _CANCELLED * (initial + jnp.sum(sizes, axis=-1))

    def directly() -> Array:
        exact = jnp.sum(jnp.square(_updated(weight, lora_A, scaled_B)), axis=-1)
        return jnp.where(cancelled, exact, squared)

    is_any = jnp.any(cancelled)
    n_squared = jax.lax.cond(is_any, directly, lambda: squared)
    n_squared, is_any, expanded = checkpoint_name((n_squared, is_any, cross + square), KEPT)
    return n_squared, (is_any, weight, lora_A, scaled_B, expanded)


def _backward(residuals: tuple[Any, ...], g: Array) -> tuple[Array | None, Array, Array, Array]:
    """With V = W + s·B A:  ∂n²/∂(sB) = 2·V Aᵀ  and  ∂n²/∂A = 2·(sB)ᵀ V, row by row of n²."""
    is_any, weight, lora_A, scaled_B, expanded = residuals
    slope = 2 * g[:, None]
    rows = slope * scaled_B

    d_A = _product(rows.T, _read(weight, lora_A)) + _product(_product(rows.T, scaled_B), lora_A)
    d_B = slope * expanded

    def directly() -> tuple[Array, Array]:
        updated = _updated(weight, lora_A, scaled_B)
        return _product(rows.T, updated), slope * _product(updated, lora_A.T)

    d_A, d_B = jax.lax.cond(is_any, directly, lambda: (d_A, d_B))
    # What nobody asks for (a frozen weight) the compiler removes.
    of_weight = None if isinstance(weight, Partial) else _product(rows, lora_A).astype(weight.dtype)
    return of_weight, g, d_A, d_B


_norm_squared.defvjp(_forward, _backward)


def _read(weight: Array | Partial, lora_A: Array) -> Array:
    """W in A's dtype."""
    return (weight() if isinstance(weight, Partial) else weight).astype(lora_A.dtype)


def _updated(weight: Array | Partial, lora_A: Array, scaled_B: Array) -> Array:
    """W + s·B A."""
    return _read(weight, lora_A) + _product(scaled_B, lora_A)


def _product(one: Array, other: Array) -> Array:
    return jnp.matmul(one, other, precision=Precision.HIGHEST)
