import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.position import MAX_DISTANCE, position_factor, relative_buckets
from hylorada_jax.math.relative_bias import gathered, relative_bias, selected


@pytest.mark.parametrize("formula", [relative_bias, gathered, selected])
def test_the_bias_and_its_gradient(formula):
    """Against the table of buckets, one pair of tokens at a time; far offsets lie beyond the table."""
    rng = np.random.default_rng(0)
    table, cotangent = rng.normal(size=(64, 3)), rng.normal(size=(2, 3, 5, 7))
    query = np.append(rng.integers(0, 500, (2, 4)), [[0], [90_000]], axis=1)
    key = np.append(rng.integers(0, 9000, (2, 6)), [[70_000], [3]], axis=1)
    expected, gradient = np.empty_like(cotangent), np.zeros_like(table)
    for b, h, q, k in np.ndindex(*cotangent.shape):
        offset = np.clip(query[b, q] - key[b, k], 1 - MAX_DISTANCE, MAX_DISTANCE - 1)
        bucket = relative_buckets()[offset + MAX_DISTANCE - 1]
        expected[b, h, q, k] = table[bucket, h]
        gradient[bucket, h] += cotangent[b, h, q, k]
    with jax.enable_x64(True):
        bias, pull = jax.vjp(lambda t: formula(t, jnp.asarray(query), jnp.asarray(key)), jnp.asarray(table))
        assert bias.dtype == jnp.float64
        np.testing.assert_array_equal(bias, expected)
        # Sums of a few numbers in another order.
        np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], gradient, rtol=0, atol=1e-14)


def test_the_two_formulas_agree_at_every_distance():
    table = jnp.asarray(np.random.default_rng(1).normal(size=(64, 1)), jnp.float32)
    key = jnp.asarray([[0, 40_000]])
    query = jnp.arange(0, 40_001)[None]
    np.testing.assert_array_equal(gathered(table, query, key), selected(table, query, key))


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int8"])
def test_positions_of_other_integers_are_as_far_apart(dtype):
    table, position_bias = jnp.arange(64.0)[:, None], jnp.linspace(-1, 1, 64)
    positions = jnp.array([[0, 1, 20, 100]])
    given = positions.astype(dtype)
    expected = relative_bias(table, positions, positions)
    np.testing.assert_array_equal(relative_bias(table, given, given), expected)
    expected = position_factor(position_bias, positions)
    np.testing.assert_array_equal(position_factor(position_bias, given), expected)
    pattern = Pattern.of_rows(given, segment_ids=given)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pattern)} == {"int32"}


def test_nothing_of_the_bias_size_is_kept_for_the_backward_pass():
    table, positions = jnp.ones((64, 2)), jnp.arange(96)[None]
    _, pull = jax.vjp(lambda t: relative_bias(t, positions, positions), table)
    kept = [leaf.size for leaf in jax.tree.leaves(pull)]
    assert kept
    assert sum(kept) <= table.size + 2 * 96
