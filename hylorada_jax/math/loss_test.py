"""Oracle: jax.nn.log_softmax over the full logits, differentiated by JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math.loss import token_nll


def full_nll(hidden, head, targets):
    log_probabilities = jax.nn.log_softmax(hidden @ head.T)
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(targets >= 0, -picked, 0)


def example(dtype, tokens=13, d=5, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, vocab, tokens)
    targets[[0, 4, tokens - 1]] = -1
    arrays = rng.normal(size=(tokens, d)), rng.normal(size=(vocab, d)), rng.normal(size=tokens)
    return *(jnp.asarray(a, dtype) for a in arrays), jnp.asarray(targets, jnp.int32)


@pytest.mark.parametrize("chunk_elements", [1, 44, 55, 10_000])  # chunks of 1, 4, 5 and all 13 tokens
def test_nll_and_both_gradients_equal_log_softmax(chunk_elements):
    with jax.enable_x64(True):
        hidden, head, weights, targets = example(jnp.float64)

        def weighted(nll):
            return lambda h, w: (weights * nll(h, w, targets)).sum()

        def chunked(h, w, y):
            return token_nll(h, w, y, chunk_elements=chunk_elements)

        nll = jax.jit(chunked)(hidden, head, targets)
        assert nll.dtype == jnp.float64
        # float64: the same sums in another order, so a few hundred roundings of 1e-16 at most.
        np.testing.assert_allclose(nll, full_nll(hidden, head, targets), rtol=0, atol=1e-13)
        expected = jax.grad(weighted(full_nll), argnums=(0, 1))(hidden, head)
        gradients = jax.jit(jax.grad(weighted(chunked), argnums=(0, 1)))(hidden, head)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert float(jnp.abs(theirs).max()) > 0.1
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


def test_ignored_targets_have_zero_loss_and_zero_gradient():
    hidden, head, _, targets = example(jnp.float32)
    nll, pull = jax.vjp(lambda h: token_nll(h, head, targets, chunk_elements=44), hidden)
    (d_hidden,) = pull(jnp.ones_like(nll))
    ignored = np.asarray(targets) < 0
    assert (np.asarray(nll)[ignored] == 0).all()
    assert (np.asarray(d_hidden)[ignored] == 0).all()
    assert (np.asarray(nll)[~ignored] > 0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half an ulp of the inputs' rounding carries through a sum of d = 5 products: a few ulps of the dtype.
    [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)],
)
def test_narrow_dtypes_keep_a_float32_loss_and_the_input_dtype_gradient(dtype, tolerance):
    hidden, head, _, targets = example(dtype)
    loss = lambda h: token_nll(h, head, targets, chunk_elements=44).sum()
    nll = token_nll(hidden, head, targets, chunk_elements=44)
    gradient = jax.grad(loss)(hidden)
    assert (nll.dtype, gradient.dtype) == (jnp.float32, dtype)
    with jax.enable_x64(True):
        wide, wide_head = jnp.asarray(hidden, jnp.float64), jnp.asarray(head, jnp.float64)
        expected = jax.grad(lambda h: full_nll(h, wide_head, targets).sum())(wide)
        np.testing.assert_allclose(nll, full_nll(wide, wide_head, targets), atol=tolerance)
        np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=tolerance)


def temporary_bytes(vocab, head_trained=False, tokens=512, d=16, chunk_elements=2**16):
    def loss(hidden, head, targets):
        return token_nll(hidden, head, targets, chunk_elements=chunk_elements).sum()

    shapes = [(tokens, d), (vocab, d)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1) if head_trained else 0))
    compiled = gradient.lower(*arguments, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert cost is not None
    return memory.temp_size_in_bytes, cost["flops"]


def test_temporary_memory_is_bounded_by_chunks_not_by_vocab():
    small, large = temporary_bytes(4_096)[0], temporary_bytes(32_768)[0]
    chunk = 2**16 * 4
    assert large - small <= chunk, (small, large)
    # The law would also hold for a program that holds everything at both sizes: the full logits are 64 MiB.
    assert large < 32_768 * 512 * 4 / 8, large


def test_gradient_of_a_frozen_head_is_not_computed():
    # Per scan body, as XLA counts: the head's own scan adds at least one more product with the chunk.
    assert temporary_bytes(4_096)[1] * 1.5 < temporary_bytes(4_096, head_trained=True)[1]
