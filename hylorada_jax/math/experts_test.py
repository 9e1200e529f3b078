"""Oracle of ragged products: each row's own product with its expert's matrix, and jax's derivatives of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math.experts import experts_dot, route, rows_of, sort_rows, sum_rows
from hylorada_jax.math.quantized import as_array, quantized

GROUPS, TOKENS, EXPERTS, CHOSEN, D_IN, D_OUT = 2, 5, 4, 2, 8, 3


def drawn():
    """Rows of which an expert has none, and what they are multiplied with."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(GROUPS, TOKENS, EXPERTS))
    logits[..., 2] = -9.0
    x = jnp.asarray(rng.normal(size=(GROUPS, TOKENS, D_IN)))
    return x, jnp.asarray(rng.normal(size=(EXPERTS, D_IN, D_OUT))), jnp.asarray(logits)


def mixed(x, kernel, logits):
    weights, experts = route(logits, CHOSEN, normalised=True)
    rows = sort_rows(experts, EXPERTS)
    return sum_rows(experts_dot(rows_of(x, rows), kernel, rows), weights, rows)


def plain(x, kernel, logits):
    """Every token with every expert; those that it has not chosen weigh nothing."""
    kept = logits >= jnp.sort(logits, axis=-1)[..., -CHOSEN, None]
    weights = jnp.where(kept, jnp.exp(logits), 0)
    return jnp.einsum("gtd,edo,gte->gto", x, kernel, weights / weights.sum(-1, keepdims=True))


def results(function, *inputs):
    """A weighted sum of a function's result, and its gradients."""
    weights = np.random.default_rng(1).normal(size=(GROUPS, TOKENS, D_OUT))
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(function(*x) * weights), argnums=(0, 1, 2)))(*inputs)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), ours, theirs)


def test_a_mixture_and_its_gradients_are_the_plain_formula():
    with jax.enable_x64(True):
        assert_close(*(results(function, *drawn()) for function in (mixed, plain)))


@pytest.mark.parametrize("axis", [None, 0])
def test_it_maps_over_rows_with_experts_in_common_and_with_their_own(axis):
    def mapped(function, x, kernels, logits):
        one = jax.vmap(lambda x, k, r: function(x[None], k, r[None])[0], in_axes=(0, axis, 0))
        return one(x, kernels, logits)

    with jax.enable_x64(True):
        x, kernel, logits = drawn()
        kernels = kernel if axis is None else jnp.stack([kernel, 2 * kernel])
        assert_close(*(results(partial(mapped, f), x, kernels, logits) for f in (mixed, plain)))


def test_a_quantised_kernel_is_the_numbers_that_it_stands_for():
    pytest.importorskip("qwix")
    with jax.enable_x64(True):
        x, kernel, logits = drawn()
        codes = jax.vmap(lambda kernel: quantized(kernel, "nf4", "float64"))(kernel)
        ours = jax.value_and_grad(lambda x: jnp.sum(mixed(x, codes, logits) ** 2))(x)
        theirs = jax.value_and_grad(lambda x: jnp.sum(plain(x, as_array(codes), logits) ** 2))(x)
        assert_close(ours, theirs)


def test_rows_are_kept_for_experts_that_train_alone():
    x, kernel, logits = drawn()
    rows = (TOKENS * CHOSEN, D_IN)
    for frozen in (True, False):
        inputs = (x,) if frozen else (x, kernel)
        _, back = jax.vjp(lambda x, kernel=kernel: mixed(x, kernel, logits), *inputs)
        assert (rows in [leaf.shape[1:] for leaf in jax.tree.leaves(back)]) is not frozen
