import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.nnx import (
    AdapterParam,
    HyLoRADALinear,
    HyLoRADAUnified,
    PositionalDAA,
    PositionBias,
    SparseAdapter,
    StructureEncoder,
    adapt,
    make_optimizer,
)
from hylorada_jax.nnx.adapting_test import WRT, config_of, made, moved
from hylorada_jax.training import optimizer as of_trees
from hylorada_jax.training.config import TrainingConfig

TRAINING = TrainingConfig(output="unused", steps=9, warmup_steps=0, learning_rate=1e-2)


def test_its_steps_are_those_of_the_trainers_optimizer():
    config = config_of("hylorada_v1", lora_plus_enabled=True)
    net, x = made("Linear")
    moved(adapt(net, config, nnx.Rngs(3)))
    kernel = net.mlp.down_proj.kernel[...]
    optimizer = nnx.Optimizer(net, make_optimizer(net, TRAINING), wrt=AdapterParam)
    tree = nnx.to_pure_dict(nnx.state(net, AdapterParam))
    transformation = of_trees.make_optimizer(tree, TRAINING, config)
    state = transformation.init(tree)

    @nnx.jit
    def step(net, optimizer):
        gradient = nnx.grad(lambda net: jnp.var(net(x)), argnums=WRT)(net)
        optimizer.update(net, gradient)
        return gradient

    of_tree = jax.jit(transformation.update)
    for _ in range(3):
        updates, state = of_tree(nnx.to_pure_dict(step(net, optimizer)), state, tree)
        tree = optax.apply_updates(tree, updates)
    found = nnx.to_pure_dict(nnx.state(net, AdapterParam))
    # Two programs: a few float32 roundings of each step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, tree)
    np.testing.assert_array_equal(net.mlp.down_proj.kernel[...], kernel)


class Named(nnx.Module):
    """A network whose author has called the layer by the method's name."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.eye(4))
        self.hylorada = HyLoRADALinear(4, 4, rank=2, rngs=rngs)

    def __call__(self, x):
        weight = self.kernel[...].T
        return self.hylorada(x, x @ weight.T, weight)


def test_a_network_may_call_its_own_layer_hylorada():
    net, x = Named(nnx.Rngs(0)), jnp.linspace(-1.0, 2.0, 8).reshape(2, 4)
    optimizer = nnx.Optimizer(net, make_optimizer(net, TRAINING), wrt=AdapterParam)
    loss = lambda net: jnp.mean((net(x) - 1) ** 2)
    before = loss(net)
    optimizer.update(net, nnx.grad(loss, argnums=WRT)(net))
    assert loss(net) < before


class Own(nnx.Module):
    """Every component, called by a model of its own."""

    def __init__(self, rngs):
        bias = PositionBias(rngs=rngs)
        self.q = HyLoRADAUnified(4, 4, rank=2, position_bias=bias, rngs=rngs)
        self.encoder = StructureEncoder(4, rngs=rngs)
        self.daa = PositionalDAA(2, rngs=rngs)
        self.sparse = SparseAdapter(4, rngs=rngs)


def test_every_leaf_of_a_layer_has_its_group():
    own, rate_of_all = Own(nnx.Rngs(0)), 2e-3
    training = TrainingConfig(
        output="unused", steps=1, warmup_steps=0, weight_decay=0, learning_rate=rate_of_all
    )
    own.q.init_magnitude(jnp.eye(4))
    optimizer = nnx.Optimizer(own, make_optimizer(own, training, HyLoRADAConfig()), wrt=AdapterParam)
    before = nnx.to_pure_dict(nnx.state(own, AdapterParam))
    # Adam's first step is the rate itself, wherever the gradient is one.
    update = nnx.jit(lambda own, optimizer, gradient: optimizer.update(own, gradient))
    update(own, optimizer, jax.tree.map(jnp.ones_like, nnx.state(own, AdapterParam)))
    after = nnx.to_pure_dict(nnx.state(own, AdapterParam))
    rates = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before, after)
    for path, rate in jax.tree_util.tree_leaves_with_path(rates):
        special = {"daa": 1e-3, "sparse": 2e-4}.get(path[0].key, rate_of_all)
        assert rate == pytest.approx(special, rel=1e-3), path


def test_parts_that_were_adapted_one_by_one_have_their_rates():
    def adapted(*ratios):
        model = nnx.List([nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))) for _ in ratios])
        for part, ratio in zip(model, ratios, strict=True):
            plus = {"lora_plus_enabled": True, "lora_plus_ratio": ratio}
            config = HyLoRADAConfig(method="lora", target_modules="all-linear", lora_rank=2, **plus)
            adapt(part, config, nnx.Rngs(1))
        return nnx.Sequential(*model)

    def rates(model):
        state = nnx.state(model, AdapterParam)
        tx = make_optimizer(model, TRAINING)
        return nnx.to_pure_dict(tx.update(jax.tree.map(jnp.ones_like, state), tx.init(state), state)[0])

    for part in rates(adapted(3.0, 3.0))["layers"].values():
        one = part["layers"][0]
        assert float(one["lora_B"].mean() / one["lora_A"].mean()) == pytest.approx(
            3, rel=0.01
        )  # weight decay
    with pytest.raises(ConfigError, match="the config to go by"):
        rates(adapted(3.0, 4.0))


def test_a_whole_model_as_what_trains_is_refused():
    net = adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(3))
    with pytest.raises(ConfigError, match=r"4 arrays, where the adapter has 2[\s\S]*wrt=AdapterParam"):
        nnx.Optimizer(net, make_optimizer(net, TRAINING), wrt=nnx.Param)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="adapt"):
        make_optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TRAINING)


def test_epochs_that_nobody_has_counted_are_refused():
    """Their steps are not known: at those that are not asked for, the rate would fall to 0."""
    net = adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(3))
    given = dataclasses.replace(TRAINING, epochs=3)
    with pytest.raises(ConfigError, match="for_rows"):
        make_optimizer(net, given)
    make_optimizer(net, given.for_rows(100))
    own = nnx.Sequential(AdapterParam(jnp.ones(2)))
    with pytest.raises(ConfigError, match="belongs to a group"):
        make_optimizer(own, TRAINING)
