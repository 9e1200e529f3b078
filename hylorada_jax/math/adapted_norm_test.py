"""Oracle: the norm of W + s·B A itself, and its derivative, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math import low_rank

D_OUT, D_IN, RANK = 48, 160, 8
# One layer's budget in parity_tests/tolerances.py: 1e-5, or two roundings times ‖W‖/n where that is more.
ROUNDING = 2.0**-24


def weights(left: float, seed: int = 0) -> list[Any]:
    """(W, A, s·B) in float32; of every second row the update leaves this part, of the others W stays most."""
    rng = np.random.default_rng(seed)
    lora_A = rng.normal(size=(RANK, D_IN)) / np.sqrt(D_IN)
    scaled_B = rng.normal(size=(D_OUT, RANK))
    update = scaled_B @ lora_A
    length = np.linalg.norm(update, axis=1, keepdims=True)
    noise = rng.normal(size=update.shape) / np.sqrt(D_IN)
    weight = np.where(np.arange(D_OUT)[:, None] % 2, 3 * length * noise, left * length * noise - update)
    return [np.asarray(x, np.float32) for x in (weight, lora_A, scaled_B)]


def exact(drawn: Any, cotangent: Any) -> list[Any]:
    """n, and cotangent · ∂n with respect to A and s·B, in float64."""
    weight, lora_A, scaled_B = (np.asarray(x, np.float64) for x in drawn)
    updated = weight + scaled_B @ lora_A
    n = np.linalg.norm(updated, axis=1)
    pulled = (cotangent / n)[:, None] * updated
    return [n, scaled_B.T @ pulled, pulled @ lora_A.T]


@jax.jit
def measured(weight, lora_A, scaled_B, cotangent):
    def norm(lora_A, scaled_B):
        return low_rank.adapted_norm(weight, low_rank.row_norm_squared(weight), lora_A, scaled_B)

    n, pull = jax.vjp(norm, lora_A, scaled_B)
    return n, *pull(cotangent)


# What is left of a row, from where its terms do not cancel down to where float32 knows three digits of it.
@pytest.mark.parametrize("left", [1.0, 0.4, 0.3, 0.2, 0.1, 0.03, 1e-2, 1e-3, 3e-4, 1e-4])
def test_the_norm_of_a_row_that_all_but_vanishes(left):
    drawn = weights(left)
    # As the derivative of c = m/n is: the rows that vanish have the largest gradient.
    cotangent = 1 / np.square(exact(drawn, np.ones(D_OUT))[0])
    expected, got = exact(drawn, cotangent), measured(*drawn, jnp.asarray(cotangent, jnp.float32))
    condition = np.linalg.norm(drawn[0], axis=1) / expected[0]
    budget = np.maximum(1e-5, 2 * ROUNDING * condition)
    np.testing.assert_array_less(np.abs(got[0] / expected[0] - 1), budget)
    for gradient, of_float64 in zip(got[1:], expected[1:], strict=True):
        difference = np.abs(np.asarray(gradient) - of_float64).max()
        # A gradient is a product with W + s·B A and n of it: twice the roundings.
        assert difference <= 2 * budget.max() * np.abs(of_float64).max()


@pytest.mark.parametrize("left", [1e-5, 1e-6, 1e-7, 1e-9, 0.0])
def test_a_row_that_is_lost_in_rounding_has_no_larger_scale_than_in_float64(left):
    drawn = weights(left)
    n = np.asarray(measured(*drawn, jnp.ones(D_OUT))[0], np.float64)
    expected, length = exact(drawn, np.ones(D_OUT))[0], np.linalg.norm(drawn[0], axis=1)
    assert np.all(1 / n <= (1 + 2 * ROUNDING * length / expected + 1e-5) / expected)
    assert np.all(n >= 0.99 * np.finfo(np.float32).eps * length)


def test_an_update_whose_own_terms_cancel():
    rng = np.random.default_rng(0)
    lora_A = rng.normal(size=(1, D_IN)) + 1e-3 * rng.normal(size=(RANK, D_IN))
    scaled_B = rng.normal(size=(D_OUT, RANK))
    scaled_B -= scaled_B.mean(axis=1, keepdims=True)
    weight = 1e-3 * rng.normal(size=(D_OUT, D_IN))
    drawn: list[Any] = [np.asarray(x, np.float32) for x in (weight, lora_A, scaled_B)]
    cotangent = np.ones(D_OUT, np.float32)
    # A entry by entry is a thousand times as large as what is left of it.
    np.testing.assert_allclose(measured(*drawn, cotangent)[0], exact(drawn, cotangent)[0], rtol=1e-4)


def test_the_frozen_weight_has_its_derivative_too():
    weight, lora_A, scaled_B = map(jnp.asarray, weights(0.5))
    gradient = jax.grad(
        lambda w: low_rank.adapted_norm(w, low_rank.row_norm_squared(w), lora_A, scaled_B).sum()
    )(weight)
    updated = np.asarray(weight, np.float64) + np.asarray(scaled_B, np.float64) @ lora_A
    expected = updated / np.linalg.norm(updated, axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5)
