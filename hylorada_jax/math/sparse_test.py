import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hylorada_jax.math import sparse


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_mask_is_exactly_the_k_largest():
    scores = jax.random.normal(jax.random.key(0), (40,))
    for k in (1, 4, 40):
        mask = np.asarray(jax.jit(sparse.topk_mask, static_argnums=(1, 2))(scores, k, 0.3))
        assert set(mask) <= {0.0, 1.0}
        assert mask.sum() == k
        assert set(np.flatnonzero(mask)) == set(np.argsort(scores)[-k:].tolist())
    assert sparse.topk_mask(jnp.zeros(5), 2, 1.0).tolist() == [1, 1, 0, 0, 0]


def test_gradient_of_the_mask_is_that_of_the_scaled_softmax():
    rng = np.random.default_rng(0)
    scores, cotangent, temperature = rng.normal(size=7), rng.normal(size=7), 0.7
    soft = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    expected = 7 / temperature * (soft * cotangent - soft * (soft @ cotangent))
    with jax.enable_x64(True):
        _, pull = jax.vjp(lambda s: sparse.topk_mask(s, 3, temperature), jnp.asarray(scores))
        # A few float64 roundings.
        np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], expected, rtol=1e-13, atol=1e-14)


def test_adapter_against_the_formula_and_differences():
    rng = np.random.default_rng(1)
    h, down, up = rng.normal(size=(2, 3, 6)), rng.normal(size=(5, 6)), rng.normal(size=(6, 5))
    mask = np.array([1.0, 0, 1, 0, 0])

    @jax.jit
    def run(h, down, up, mask):
        return sparse.add_units(h, sparse.units(h, down, mask), up)

    with jax.enable_x64(True):
        values = [jnp.asarray(value) for value in (h, down, up, mask)]
        # A few float64 roundings.
        np.testing.assert_allclose(run(*values), h + gelu(h @ down.T * mask) @ up.T, rtol=0, atol=1e-13)
        check_grads(run, values, order=1, modes=["rev"])


def test_a_fresh_adapter_changes_nothing_in_any_dtype():
    leaves = sparse.init_leaves(jax.random.key(0), 8, 16)
    assert {name: leaf.shape for name, leaf in leaves.items()} == sparse.leaf_shapes(8, 16)
    mask = sparse.topk_mask(leaves["gate_scores"], 2, 1.0)
    for dtype in (jnp.bfloat16, jnp.float32):
        h = jax.random.normal(jax.random.key(1), (1, 2, 16), dtype)
        out = sparse.add_units(h, sparse.units(h, leaves["down"], mask), leaves["up"])
        assert out.dtype == dtype
        assert jnp.array_equal(out, h)


@pytest.mark.parametrize(("ratio", "units", "k"), [(0.1, 128, 12), (0.1, 4, 1), (1.0, 7, 7), (0.5, 5, 2)])
def test_units_on(ratio, units, k):
    assert sparse.units_on(ratio, units) == k


def rank_correlation(draws):
    """The largest between two of them; those of one key have the same ranks, whatever their distribution."""
    ranks = [np.argsort(np.argsort(each)) for each in draws]
    return np.abs(np.corrcoef(ranks) - np.eye(len(ranks))).max()


def test_initial_distributions():
    leaves = sparse.init_leaves(jax.random.key(3), 4096, 16)
    # 4096 draws: the sample deviation has a relative standard error of 1.1%; 5% is over four of them.
    assert float(leaves["gate_scores"].std()) == pytest.approx(0.02, rel=0.05)
    assert rank_correlation(leaves[name].ravel()[:4096] for name in ("down", "gate_scores")) < 0.1
    bound = 16**-0.5
    assert bound * 0.99 < float(jnp.abs(leaves["down"]).max()) <= bound
