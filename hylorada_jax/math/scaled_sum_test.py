import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math.scaled_sum import scaled_sum


def drawn(dtype):
    rng = np.random.default_rng(0)
    base, delta, g = (jnp.asarray(rng.standard_normal((2, 5, 6)), dtype) for _ in range(3))
    wide = jnp.promote_types(dtype, jnp.float32)
    return base, delta.astype(wide), jnp.asarray([1.5, -0.25, 1e-3, 0.0, 1.0, 40.0], wide), g


def written(base, delta, scale):
    return ((base.astype(delta.dtype) + delta) * scale).astype(base.dtype)


# Of bfloat16: the ten numbers of a sum are rounded to 8 bits.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("bfloat16", 2**-6)])
def test_it_has_the_derivative_of_the_formula_as_it_is_written(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        *arguments, g = drawn(dtype)
        y, pull = jax.vjp(scaled_sum, *arguments)
        expected, pull_written = jax.vjp(written, *arguments)
        for ours, theirs in zip((y, *pull(g)), (expected, *pull_written(g)), strict=True):
            assert ours.dtype == theirs.dtype
            ours, theirs = (np.asarray(x, float) for x in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_of_every_token_it_keeps_y_alone():
    base, delta, scale, _ = drawn("bfloat16")
    _, pull = jax.vjp(scaled_sum, base, delta, scale)
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.size(leaf) >= base.size]
    assert [leaf.dtype for leaf in kept] == [base.dtype]
