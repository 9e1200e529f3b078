import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.sparse_test import gelu
from hylorada_jax.modules.sparse import SparseAdapter, TopKGate


def test_gate_is_exact_and_its_gradient_that_of_the_scaled_softmax():
    rng = np.random.default_rng(0)
    scores, cotangent = rng.normal(size=10), rng.normal(size=10)
    gate = TopKGate(10, topk_ratio=0.35, temperature=0.5)
    with jax.enable_x64(True):
        mask, pull = jax.vjp(
            lambda s: gate.apply({"params": {"gate_scores": s}}), jnp.asarray(scores, jnp.float64)
        )
        _, soft = jax.vjp(lambda s: 10 * jax.nn.softmax(s / 0.5), jnp.asarray(scores, jnp.float64))
        assert np.flatnonzero(mask).tolist() == sorted(np.argsort(scores)[-3:].tolist())
        assert set(np.asarray(mask)) == {0.0, 1.0}
        np.testing.assert_array_equal(pull(jnp.asarray(cotangent))[0], soft(jnp.asarray(cotangent))[0])


def test_adapter_against_the_formula():
    rng = np.random.default_rng(1)
    leaves = {
        "down": rng.normal(size=(8, 5)),
        "up": rng.normal(size=(5, 8)),
        "gate_scores": rng.normal(size=8),
    }
    h = rng.normal(size=(2, 3, 5))
    mask = leaves["gate_scores"] >= np.sort(leaves["gate_scores"])[-2]
    with jax.enable_x64(True):
        out = SparseAdapter(8, topk_ratio=0.25).apply({"params": jax.tree.map(jnp.asarray, leaves)}, h)
        # A few float64 roundings.
        expected = h + gelu(h @ leaves["down"].T * mask) @ leaves["up"].T
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


def test_dropout_is_of_training_alone():
    adapter, h = SparseAdapter(16, topk_ratio=1.0, dropout=0.5), jnp.ones((1, 4, 8))
    variables = adapter.init(jax.random.key(0), h)
    assert set(variables["params"]) == {"down", "up", "gate_scores"}
    params = variables["params"] | {"up": jnp.ones((8, 16))}
    quiet = adapter.apply({"params": params}, h)
    assert jnp.array_equal(quiet, adapter.apply({"params": params}, h))
    noisy = adapter.apply({"params": params}, h, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert not jnp.array_equal(quiet, noisy)


@pytest.mark.parametrize("settings", [{"adapter_dim": 0}, {"topk_ratio": 1.5}, {"temperature": 0.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="TopKGate"):
        TopKGate(**settings).init(jax.random.key(0))
    with pytest.raises(ConfigError, match="dropout"):
        SparseAdapter(dropout=-0.5).init(jax.random.key(0), jnp.ones((1, 2)))
