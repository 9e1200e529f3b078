from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.nnx import adapt, resolve, save_adapter
from hylorada_jax.nnx.adapting_test import WRT, Blocks, made, moved, output

V1 = HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules="all-linear")
SPARSE = HyLoRADAConfig(method="sparse", sparse_adapter_dim=7, sparse_topk_ratio=0.5)
BATCHES = jax.random.normal(jax.random.key(1), (3, 2, 6))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: Blocks(2, stacked=False, rngs=nnx.Rngs(0)), V1),
        (lambda: Blocks(2, stacked=True, rngs=nnx.Rngs(0)), V1),
        (lambda: made("Linear")[0], SPARSE),
    ],
    ids=["listed", "stacked", "sparse"],
)
def test_resolved_once_microbatches_have_the_same_gradients(make, config):
    with jax.enable_x64(True):
        net = make()
        nnx.update(net, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(net)))
        net = moved(adapt(net, config, nnx.Rngs(1)))

        def loss(net, once):
            called = resolve(net) if once else net
            return sum(jnp.sum(jnp.sin(called(x.astype(jnp.float64)))) for x in BATCHES)

        gradient = nnx.jit(nnx.grad(loss, argnums=WRT), static_argnums=1)
        expected, found = gradient(net, False), gradient(net, True)
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
        jax.tree.map(same, found, expected)


def test_a_call_of_what_is_resolved_costs_what_loras_does():
    def flops(model):
        graph, state = nnx.split(model)
        program = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        cost: Any = program.lower(state, BATCHES[0]).compile().cost_analysis()
        return cost["flops"]

    v1, lora = (
        nnx.Sequential(nnx.Linear(6, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 6, rngs=nnx.Rngs(0)))
        for _ in range(2)
    )
    adapt(v1, V1, nnx.Rngs(1))
    adapt(lora, HyLoRADAConfig(method="lora", lora_rank=2, target_modules="all-linear"), nnx.Rngs(1))
    norms = 2 * 2 * 2 * 6 * 64  # W Aᵀ of both layers
    # What is left beside LoRA is a product with c, of every output.
    assert flops(resolve(v1)) <= flops(resolve(lora)) + 4 * 2 * (64 + 6)
    assert flops(v1) >= flops(resolve(v1)) + norms


def test_what_is_resolved_again_is_not_compiled_again():
    net, x = made("Linear")
    adapt(net, V1, nnx.Rngs(1))
    traced = []

    @nnx.jit
    def run(net, x):
        traced.append(1)
        return net(x)

    for _ in range(3):
        run(resolve(moved(net)), x)
    assert len(traced) == 1


def test_what_is_resolved_draws_dropout_from_the_model_and_is_not_saved(tmp_path):
    config = HyLoRADAConfig(method="lora", lora_rank=2, lora_dropout=0.5, target_modules="all-linear")
    net = moved(adapt(Blocks(1, stacked=False, rngs=nnx.Rngs(0)), config, nnx.Rngs(1)))
    first, second = (output(resolve(net), BATCHES[0]) for _ in range(2))
    assert not jnp.array_equal(first, second)
    with pytest.raises(ModelError, match="resolved from"):
        save_adapter(resolve(net), tmp_path)
