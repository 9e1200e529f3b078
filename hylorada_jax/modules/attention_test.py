import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math.position_test import relative_bucket
from hylorada_jax.modules.attention import DirectAttentionAdapter, PositionalDAA, ShiftedSparseAttention

KEY = jax.random.key(0)


@pytest.mark.parametrize("per_head", [True, False])
def test_daa_against_the_formula(per_head):
    rng = np.random.default_rng(0)
    scores, heads = rng.normal(size=(2, 3, 4, 6)), 3 if per_head else 1
    leaves = {"alpha": rng.normal(size=heads), "beta": rng.normal(size=heads)}
    table = rng.normal(size=(64, heads))
    query, key = rng.integers(0, 9000, (2, 4)), rng.integers(0, 9000, (2, 6))
    bucket = np.vectorize(relative_bucket)(query[:, :, None] - key[:, None, :])
    plain = leaves["alpha"][:, None, None] * scores + leaves["beta"][:, None, None]
    with jax.enable_x64(True):
        params, positional = jax.tree.map(jnp.asarray, (leaves, leaves | {"position_bias": table}))
        found = DirectAttentionAdapter(3, per_head).apply({"params": params}, scores)
        # A few float64 roundings.
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-14)
        found = PositionalDAA(3, per_head).apply({"params": positional}, scores, query, key)
        np.testing.assert_allclose(found, plain + np.moveaxis(table[bucket], -1, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("adapter", [DirectAttentionAdapter(4), PositionalDAA(4)])
def test_fresh_daa_changes_nothing(adapter):
    scores = jax.random.normal(KEY, (2, 4, 5, 5), jnp.bfloat16)
    adapted, _ = adapter.init_with_output(KEY, scores)
    assert adapted.dtype == scores.dtype
    assert jnp.array_equal(adapted, scores)


def test_beta_alone_changes_nothing_under_softmax():
    scores = jax.random.normal(KEY, (2, 3, 4, 4))
    with_beta = {"params": {"alpha": jnp.ones(3), "beta": jnp.array([-3.0, 0.5, 2.0])}}
    weights = jax.nn.softmax(DirectAttentionAdapter(3).apply(with_beta, scores))
    # β up to 3 rounds logits of that size: 2^-23 · 4.
    np.testing.assert_allclose(weights, jax.nn.softmax(scores), rtol=0, atol=5e-7)


def test_daa_without_positions_counts_from_zero():
    scores, table = jnp.zeros((1, 1, 5, 5)), jnp.arange(64.0)[:, None]
    params = {"alpha": jnp.ones(1), "beta": jnp.zeros(1), "position_bias": table}
    adapted = PositionalDAA(1).apply({"params": params}, scores)[0, 0]
    assert adapted.tolist() == [[relative_bucket(q - k) for k in range(5)] for q in range(5)]


def test_daa_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="num_heads must be ≥ 1"):
        PositionalDAA(0).init(KEY, jnp.ones((1, 0, 2, 2)))
    with pytest.raises(ConfigError, match="num_heads=5"):
        DirectAttentionAdapter(5).init(KEY, jnp.ones((1, 4, 2, 2)))
    with pytest.raises(DataError, match="Pass both"):
        PositionalDAA(4).init(KEY, jnp.ones((1, 4, 1, 2)))
    with pytest.raises(DataError, match="integers ≥ 0"):
        PositionalDAA(4).init(KEY, jnp.ones((1, 4, 1, 2)), jnp.array([[1]]), jnp.array([[0, -1]]))


def test_shifted_attention_refuses_what_does_not_fit():
    def run(heads=4, kv_heads=2, group_size=4, shift_ratio=0.5, **given):
        query, key = jnp.ones((1, 6, heads, 8)), jnp.ones((1, 6, kv_heads, 8))
        return ShiftedSparseAttention(group_size, shift_ratio).apply({}, query, key, key, **given)

    for settings in ({"group_size": 5}, {"shift_ratio": 1.0}, {"heads": 1, "kv_heads": 1}, {"heads": 3}):
        with pytest.raises(ConfigError):
            run(**settings)
    for given in ({"positions": [[0, 1]]}, {"segment_ids": jnp.ones(6, int)}, {"positions": [[-1] * 6]}):
        with pytest.raises(DataError):
            run(**given)
