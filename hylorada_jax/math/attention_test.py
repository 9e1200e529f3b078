import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math.attention import attention
from hylorada_jax.math.pattern import Pattern


def by_hand(query, key, value, mask, sinks=None):
    """Attention with repeated heads, one query at a time, in float64."""
    groups = query.shape[2] // key.shape[2]
    out = np.zeros(query.shape)
    for b, q, h in np.ndindex(*query.shape[:3]):
        seen = np.broadcast_to(mask, (query.shape[0], 1, query.shape[1], key.shape[1]))[b, 0, q]
        logits = key[b, :, h // groups] @ query[b, q, h] / np.sqrt(query.shape[-1])
        weights = np.where(seen, np.exp(logits - logits[seen].max()), 0.0)
        sink = 0.0 if sinks is None else np.exp(sinks[h] - logits[seen].max())
        out[b, q, h] = weights @ value[b, :, h // groups] / (weights.sum() + sink)
    return out


def sample(dtype, *, batch=2, queries=5, keys=7, heads=6, kv_heads=2, head_dim=4):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(batch, queries, heads, head_dim))
    key, value = rng.normal(size=(2, batch, keys, kv_heads, head_dim))
    return [np.asarray(x, dtype) for x in (query, key, value)]


# float32: sums of 7 terms; float64 alike; bfloat16: weights and outputs rounded to 8 bits.
@pytest.mark.parametrize(
    ("dtype", "atol"), [(jnp.float32, 1e-6), (jnp.float64, 1e-14), (jnp.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize(("kv_heads", "sinks"), [(1, None), (2, [0.5, -1.0, 2.0, 0.0, 1.0, -3.0]), (6, None)])
def test_attention_equals_the_formula(dtype, atol, kv_heads, sinks):
    with jax.enable_x64(True):
        query, key, value = (jnp.asarray(x, dtype) for x in sample(np.float64, kv_heads=kv_heads))
        pattern = last_queries(5, 7, window=4)
        out = attention(
            query, key, value, pattern, sinks=None if sinks is None else jnp.asarray(sinks, dtype)
        )
        wide = [np.asarray(x, np.float64) for x in (query, key, value)]
        expected = by_hand(wide[0], wide[1], wide[2], np.asarray(pattern.mask()), sinks)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=str)
def test_a_row_without_a_visible_key_is_finite(dtype):
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, dtype) for x in sample(np.float64, queries=7)]
        pattern = last_queries(7, 7, key_valid=jnp.arange(7) >= jnp.array([[3], [0]]))
        assert not pattern.mask()[0, 0, 0].any()
        for sinks in (None, jnp.full(6, -3.0, dtype)):
            run = lambda x, sinks=sinks: attention(x[0], x[1], x[2], pattern, sinks=sinks).sum()
            out, gradients = jax.value_and_grad(run)(inputs)
            assert all(jnp.isfinite(x).all() for x in (out, *gradients))


def last_queries(queries, keys, *, batch=2, **facts):
    """The pattern of the last tokens of every row."""
    at, positions = jnp.arange(keys), jnp.tile(jnp.arange(keys), (batch, 1))
    return Pattern(at[-queries:], at, positions[:, -queries:], positions, **facts)


def intermediates(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def test_keys_and_values_are_never_repeated():
    query, key, value = sample(np.float32, batch=1, queries=2, keys=4096, heads=32, kv_heads=2, head_dim=64)
    pattern = last_queries(2, 4096, batch=1)

    def loss(query, key, value):
        return attention(query, key, value, pattern).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    # Repeating takes 16 times a key array; the logits have 2·32·4096 numbers, half a key array.
    sizes = [aval.size for aval in intermediates(jax.make_jaxpr(gradient)(query, key, value).jaxpr)]
    assert max(sizes) <= key.size
    memory = jax.jit(gradient).lower(query, key, value).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 8 * key.nbytes
