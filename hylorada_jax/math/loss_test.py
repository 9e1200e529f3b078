"""Oracle: jax.nn.log_softmax over the full logits, differentiated by JAX itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math import loss, loss_blocks
from hylorada_jax.math.loss import chunk_tokens, logits, token_nll
from hylorada_jax.math.quantized import as_array, quantized


def full_nll(hidden, head, targets, soft_cap=None):
    scores = hidden @ head.T
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    log_probabilities = jax.nn.log_softmax(scores)
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, -picked, 0)


def example(dtype, scored=(10, 5), tokens=13, d=5, vocab=11, seed=0):
    """Groups of tokens, of which so many are scored, anywhere."""
    rng = np.random.default_rng(seed)
    groups = len(scored)
    targets = rng.integers(0, vocab, (groups, tokens))
    for group, count in enumerate(scored):
        targets[group, rng.permutation(tokens)[count:]] = -1
    arrays = (
        rng.normal(size=(groups, tokens, d)), rng.normal(size=(vocab, d)), rng.normal(size=(groups, tokens))
    )  # fmt: skip
    return *(jnp.asarray(a, dtype) for a in arrays), jnp.asarray(targets, jnp.int32)


def results(nll):
    """Jitted (hidden, head, weights, targets) → the loss alone, and the loss with its two gradients."""

    def of(hidden, head, weights, targets):
        loss, pull = jax.vjp(lambda h, w: nll(h, w, targets), hidden, head)
        return nll(hidden, head, targets), loss, *pull(weights.astype(loss.dtype))

    return jax.jit(of)


full_results = results(full_nll)


# Chunks of 1, 4, 5 and all 13 tokens; of those that are scored some, all, none.
@pytest.mark.parametrize(
    ("scored", "chunk", "turns"),
    [
        ((0, 1, 7), 1, 7),
        ((0, 1, 7), 4, 2),
        ((5, 0, 1), 5, 1),
        ((0, 1, 7), 13, 1),
        ((13, 13, 4), 4, 4),
        ((0, 0, 0), 4, 0),
    ],
)
def test_nll_and_both_gradients_equal_log_softmax(scored, chunk, turns, monkeypatch):
    products: list[int] = []

    def counted(*arguments):
        jax.debug.callback(lambda: products.append(1))
        return logits(*arguments)

    monkeypatch.setattr(loss, "logits", counted)
    with jax.enable_x64(True):
        given = example(jnp.float64, scored)
        ours = results(partial(token_nll, chunk_elements=11 * chunk))(*given)
        assert ours[0].dtype == jnp.float64
        for mine, oracle in zip(ours, full_results(*given), strict=True):
            assert float(jnp.abs(oracle).max()) > 0.1 or not any(scored)
            # float64: the same sums in another order, so a few hundred roundings of 1e-16 at most.
            np.testing.assert_allclose(mine, oracle, rtol=0, atol=1e-13)
    jax.effects_barrier()
    # As many turns as the group with the most scored tokens needs, in each of the three loops.
    assert len(products) == 3 * turns


@pytest.mark.parametrize(
    ("dtype", "soft_cap", "tolerance"),
    # Of sums of 300 weights and 150 tokens, of 24 and 8 bits: what they are rounded to, and the sums.
    [(jnp.float32, None, 1e-5), (jnp.float32, 3.0, 1e-5), (jnp.bfloat16, None, 1e-2)],
)
def test_the_kernel_and_its_gradients_equal_log_softmax(dtype, soft_cap, tolerance):
    """Two chunks of tokens, and blocks of words; the last of each is not full."""
    given = example(dtype, scored=(150, 1030), tokens=1100, d=16, vocab=900)
    ours = results(partial(token_nll, soft_cap=soft_cap, kernel=True, chunk_elements=900 * 100))(*given)
    assert [x.dtype for x in ours] == [jnp.float32, jnp.float32, dtype, dtype]
    with jax.enable_x64(True):
        wide = (*(jnp.asarray(np.asarray(x, np.float64)) for x in given[:3]), given[3])
        exact = [np.asarray(x) for x in results(partial(full_nll, soft_cap=soft_cap))(*wide)]
    for mine, oracle in zip(ours, exact, strict=True):
        assert np.abs(np.asarray(mine, np.float64) - oracle).max() < tolerance * np.abs(oracle).max()


@pytest.mark.parametrize(("kind", "soft_cap"), [("int8", 3.0), ("nf4", None)])
def test_the_loss_over_a_quantised_head_equals_log_softmax_on_its_numbers(kind, soft_cap, monkeypatch):
    """Two chunks of tokens, and blocks of 4 words, of which the last begins among known ones."""
    pytest.importorskip("qwix")
    monkeypatch.setattr(loss_blocks, "_NUMBERS", 4 * 8)
    with jax.enable_x64(True):
        hidden, head, weights, targets = example(jnp.float64, (0, 13, 7), d=8)
        codes = quantized(head, kind, "float64", out_in=True)
        nll = partial(token_nll, soft_cap=soft_cap, chunk_elements=4 * 7)

        @jax.jit
        def of(hidden, codes):
            loss, pull = jax.vjp(lambda h: nll(h, codes, targets), hidden)
            return nll(hidden, codes, targets), loss, *pull(weights)

        oracle = results(partial(full_nll, soft_cap=soft_cap))(hidden, as_array(codes), weights, targets)
        for mine, expected in zip(of(hidden, codes), oracle[:3], strict=True):
            np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-13)


def test_where_a_token_stands_in_its_group_changes_nothing():
    with jax.enable_x64(True):
        hidden, head, weights, targets = example(jnp.float64)
        order = np.random.default_rng(1).permutation(targets.shape[1])
        of = results(partial(token_nll, chunk_elements=44))
        *by_token, d_head = of(hidden, head, weights, targets)
        moved = of(hidden[:, order], head, weights[:, order], targets[:, order])
        for ours, theirs in zip(moved, (*(x[:, order] for x in by_token), d_head), strict=True):
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
    nll = token_nll(hidden, head, targets, chunk_elements=44)
    gradient = jax.grad(lambda h: token_nll(h, head, targets, chunk_elements=44).sum())(hidden)
    assert (nll.dtype, gradient.dtype) == (jnp.float32, dtype)
    with jax.enable_x64(True):
        wide, wide_head = jnp.asarray(hidden, jnp.float64), jnp.asarray(head, jnp.float64)
        expected = jax.grad(lambda h: full_nll(h, wide_head, targets).sum())(wide)
        np.testing.assert_allclose(nll, full_nll(wide, wide_head, targets), atol=tolerance)
        np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=tolerance)


@pytest.mark.parametrize("vocab", [256, 32_000, 2**16, 2**16 + 1, 151_936, 262_144])
def test_chunks_hold_few_logits_and_enough_tokens(vocab):
    for tokens in (1, 255, 4096, 10**6):
        chunk = chunk_tokens(tokens, vocab)
        assert chunk * vocab <= (2**26 if vocab > 2**16 else 2**24)
        # Else reading the head would take longer than its products; equal parts may be a little smaller.
        assert chunk >= min(tokens, 240)


def temporary_bytes(vocab, head_trained=False, tokens=512, d=16, chunk_elements=2**16):
    def total(hidden, head, targets):
        return token_nll(hidden, head, targets, chunk_elements=chunk_elements).sum()

    shapes = [(1, tokens, d), (vocab, d)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1) if head_trained else 0))
    compiled = gradient.lower(*arguments, jax.ShapeDtypeStruct((1, tokens), jnp.int32)).compile()
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
    # Per loop body, as XLA counts: the head's own loop adds at least one more product with the chunk.
    assert temporary_bytes(4_096)[1] * 1.5 < temporary_bytes(4_096, head_trained=True)[1]
