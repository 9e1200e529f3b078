from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.nnx import (
    AdapterBank,
    AdapterParam,
    Attention,
    adapt,
    disabled,
    load_adapter,
    make_optimizer,
    resolve,
    save_adapter,
)
from hylorada_jax.nnx.adapting_test import WRT, Blocks, made, moved, output
from hylorada_jax.nnx.hooks_test import SelfAttention
from hylorada_jax.training.config import TrainingConfig

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


class Reading(nnx.Module):
    """A model in which each part that is no linear adapter has its place."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Embed(7, 6, rngs=rngs), nnx.RMSNorm(6, rngs=rngs)
        self.attn = SelfAttention(Attention, rngs)

    def __call__(self, ids):
        return self.attn(self.norm(self.embed(ids)))


IDS = jnp.array([[1, 2, 2, 6], [5, 0, 3, 1]])
TRAINING = TrainingConfig(output="unused", steps=9, warmup_steps=0, learning_rate=1e-2)


@pytest.mark.parametrize("part", ["daa_enabled", "train_norms", "train_embeddings"])
def test_a_part_alone_starts_as_the_base_learns_as_beside_lora_and_resolves(part, tmp_path):
    on: dict[str, Any] = {part: True}
    config = HyLoRADAConfig(method="sparse", sparse_enabled=False, **on)
    net, base = adapt(Reading(), config, nnx.Rngs(1)), output(Reading(), IDS)
    np.testing.assert_allclose(output(net, IDS), base, rtol=1e-6, atol=1e-6)
    # LoRA's B starts at zero, under which the other leaves' gradients are the same.
    beside = HyLoRADAConfig(method="lora", lora_rank=2, target_modules="all-linear", **on)
    gradient = nnx.jit(nnx.grad(lambda net: jnp.sum(jnp.sin(net(IDS))), argnums=WRT))
    expected = dict(nnx.to_flat_state(gradient(adapt(Reading(), beside, nnx.Rngs(1)))))
    found = dict(nnx.to_flat_state(gradient(net)))
    assert found.keys() == {path for path in expected if not path[-1].startswith("lora")}
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf[...], expected[path][...], rtol=1e-4, atol=1e-6)
        assert leaf.dtype == jnp.float32
    optimizer = nnx.Optimizer(net, make_optimizer(net, TRAINING), wrt=AdapterParam)
    optimizer.update(net, nnx.grad(lambda net: jnp.sum(jnp.sin(net(IDS))), argnums=WRT)(net))
    learnt = output(net, IDS)
    assert not np.allclose(learnt, base, atol=1e-4)
    np.testing.assert_array_equal(output(resolve(net), IDS), learnt)
    save_adapter(net, tmp_path)
    np.testing.assert_array_equal(output(load_adapter(Reading(), tmp_path), IDS), learnt)
    if part == "daa_enabled":  # embeddings and norms are not taken off
        rows = AdapterBank(net)(IDS, adapters=["default", None])
        np.testing.assert_allclose(rows, jnp.stack([learnt[0], base[1]]), rtol=1e-5, atol=1e-6)
        with disabled(net):
            np.testing.assert_allclose(output(net, IDS), base, rtol=1e-6, atol=1e-6)
