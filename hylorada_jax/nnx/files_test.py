import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, ModelError
from hylorada_jax.nnx import (
    AdapterBank,
    AdapterParam,
    adapt,
    load_adapter,
    merge,
    resolve,
    save_adapter,
    unload,
)
from hylorada_jax.nnx.adapting_test import METHODS, config_of, made, moved, with_numbers
from hylorada_jax.saved.adapter_files import write_adapter
from hylorada_jax.saved.base_identity import base_identity


@pytest.mark.parametrize(
    ("layer", "method"),
    [*(("Linear", method) for method in METHODS), *((layer, "dora") for layer in ("Einsum", "foreign"))],
)
def test_a_saved_adapter_is_loaded_bit_for_bit(layer, method, tmp_path):
    net, x = made(layer)
    moved(adapt(net, config_of(method), nnx.Rngs(3)))
    save_adapter(net, tmp_path)
    loaded = load_adapter(made(layer)[0], tmp_path)
    same = jax.tree.map(jnp.array_equal, nnx.state(loaded, AdapterParam), nnx.state(net, AdapterParam))
    assert jax.tree.leaves(same)
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(loaded(x), net(x))
    with pytest.raises(CheckpointError, match="not overwritten"):
        save_adapter(net, tmp_path)


@pytest.mark.parametrize("rngs", [None, nnx.Rngs(5)], ids=["without rngs", "with rngs"])
def test_layers_of_a_loaded_adapter_drop_units_each_of_its_own(rngs, tmp_path):
    layers = lambda: nnx.Sequential(*(nnx.Linear(64, 64, rngs=nnx.Rngs(0)) for _ in range(3)))
    config = HyLoRADAConfig(method="lora", target_modules="all-linear", lora_dropout=0.5)
    save_adapter(adapt(layers(), config, nnx.Rngs(1)), tmp_path)
    net = load_adapter(layers(), tmp_path, rngs=rngs)
    x = jnp.ones((8, 64))
    assert (rngs is None) == all(bool(jnp.all(layer.lora_dropout(x) == x)) for layer in net.layers)
    net.train()
    first, second, third = (layer.lora_dropout(x) > 0 for layer in net.layers)
    for one, other in ((first, second), (first, third), (second, third)):
        # 512 independent ones agree in 256 ± 11; the same ones in all.
        assert 0.3 < float((one == other).mean()) < 0.7


class Renamed(nnx.Module):
    """The layer of a Net at another path."""

    def __init__(self, rngs):
        self.attn = nnx.Dict(out=nnx.Linear(6, 5, rngs=rngs))


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: made("LinearGeneral, heads")[0], CheckpointError),  # another shape
        (lambda: Renamed(nnx.Rngs(0)), CheckpointError),
        (lambda: adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(0)), ModelError),
        (lambda: "model", ModelError),
        (lambda: with_numbers("int8"), ModelError),
    ],
    ids=["shapes", "paths", "adapted", "no model", "integers"],
)
def test_an_adapter_of_another_model_is_refused_and_nothing_changes(model, error, tmp_path):
    config = HyLoRADAConfig(method="lora", lora_rank=2, target_modules="all-linear")
    save_adapter(adapt(made("Linear")[0], config, nnx.Rngs(3)), tmp_path)
    model = model()
    before = nnx.split(model)[0] if isinstance(model, nnx.Module) else None
    with pytest.raises(error):
        load_adapter(model, tmp_path)
    if before is not None:
        assert nnx.split(model)[0] == before


def test_an_adapter_of_layers_stacked_afterwards_is_refused_and_its_leaves_go_over_to_a_stack(tmp_path):
    config, stacked = config_of("dora"), nnx.vmap(lambda rngs: Blocks(NAMED, rngs), in_axes=0, out_axes=0)
    inside = nnx.vmap(lambda rngs: adapt(Blocks(NAMED, rngs), config, rngs), in_axes=0, out_axes=0)
    late = moved(inside(nnx.Rngs(0).split(3)))
    for call in (lambda net: save_adapter(net, tmp_path / "late"), merge, resolve):
        with pytest.raises(ModelError, match=r"\(3, 2, 9\).*\n.*then adapt the model"):
            call(late)
    assert not (tmp_path / "late").exists()
    net = adapt(stacked(nnx.Rngs(0).split(3)), config, nnx.Rngs(1))
    nnx.update(net, nnx.state(late, AdapterParam))
    save_adapter(net, tmp_path)
    again = load_adapter(stacked(nnx.Rngs(0).split(3)), tmp_path)
    same = jax.tree.map(jnp.array_equal, nnx.state(again, AdapterParam), nnx.state(late, AdapterParam))
    assert all(jax.tree.leaves(same))


def test_an_adapter_that_is_loaded_to_infer_drops_nothing_until_it_trains(tmp_path):
    net, x = made("Linear")
    save_adapter(moved(adapt(net, config_of("lora", lora_dropout=0.5), nnx.Rngs(3))), tmp_path)
    loaded = load_adapter(made("Linear")[0], tmp_path)
    np.testing.assert_array_equal(loaded(x), loaded(x))
    loaded.train()
    assert not jnp.array_equal(loaded(x), loaded(x))
    training = load_adapter(made("Linear")[0], tmp_path, rngs=nnx.Rngs(0))
    assert not jnp.array_equal(training(x), training(x))


def test_a_config_that_is_none_is_refused_or_not_read(tmp_path):
    net, _ = made("Linear")
    adapt(net, config_of("lora"), nnx.Rngs(3))
    with pytest.raises(ConfigError, match="base_config is one of transformers"):
        save_adapter(net, tmp_path, base_config={"model_type": "llama"})
    net.config = types.SimpleNamespace(model_type="mine")
    save_adapter(net, tmp_path)
    load_adapter(made("Linear")[0], tmp_path)


def test_a_damaged_adapter_leaves_the_model_as_it_was(tmp_path):
    net, _ = made("Linear")
    save_adapter(adapt(nnx.clone(net), config_of("lora"), nnx.Rngs(3)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    before = nnx.split(net)[0]
    with pytest.raises(CheckpointError):
        load_adapter(net, tmp_path)
    assert nnx.split(net)[0] == before


class Blocks(nnx.Module):
    """Three layers in a row, of these names."""

    def __init__(self, names, rngs=None):
        self.order = names
        for seed, name in enumerate(names):
            setattr(self, name, nnx.Linear(9, 9, use_bias=False, rngs=rngs or nnx.Rngs(seed)))

    def __call__(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


BY_DEPTH = HyLoRADAConfig(method="lora", lora_rank=8, rank_strategy="decreasing", target_modules="all-linear")
NUMBERED, NAMED = ("block_0", "block_1", "block_2"), ("fc", "mid", "out")


def written(directory, names, ranks, config=BY_DEPTH, ranks_of_b=None):
    """An adapter's file by hand, and its leaves."""
    rng = np.random.default_rng(0)
    leaves = {}
    for name, rank, other in zip(names, ranks, ranks_of_b or ranks, strict=True):
        leaves[f"{name}.lora_A"] = rng.normal(size=(rank, 9)).astype(np.float32)
        leaves[f"{name}.lora_B"] = rng.normal(size=(9, other)).astype(np.float32)
    identity = base_identity(None, None, [(name, 9, 9) for name in sorted(names)])
    write_adapter(directory, leaves, config, identity, overwrite=True)
    return leaves


@pytest.mark.parametrize(
    ("names", "ranks", "config"),
    [
        (NUMBERED, (8, 8, 8), BY_DEPTH),
        (NAMED, (8, 8, 8), BY_DEPTH),
        (NUMBERED, (8, 6, 4), BY_DEPTH),
        (NUMBERED, (8, 3, 8), dataclasses.replace(BY_DEPTH, rank_pattern={"block_1": 3})),
        (NUMBERED, (8, 3, 4), dataclasses.replace(BY_DEPTH, rank_pattern={"block_1": 3})),
    ],
    ids=["former", "no numbers", "today's", "former with a pattern", "today's with a pattern"],
)
def test_an_adapter_whose_depths_were_read_otherwise_keeps_its_ranks(names, ranks, config, tmp_path):
    leaves = written(tmp_path / "former", names, ranks, config)
    loaded = load_adapter(Blocks(names), tmp_path / "former")
    x = jax.random.normal(jax.random.key(0), (4, 9))
    expected = np.asarray(x)
    s = config.lora_alpha / config.lora_rank  # α keeps its ratio to the rank
    for name in names:
        A, B, kernel = leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"], getattr(loaded, name).kernel[...]
        expected = expected @ np.asarray(kernel) + s * expected @ A.T @ B.T
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert (loaded.hylorada.config == config) == (ranks[2] == 4)
    save_adapter(loaded, tmp_path / "again")
    np.testing.assert_array_equal(load_adapter(Blocks(names), tmp_path / "again")(x), loaded(x))
    bank = AdapterBank(loaded)
    bank.load("other", tmp_path / "former")
    np.testing.assert_array_equal(*bank(jnp.stack([x, x]), adapters=["default", "other"]))
    assert unload(loaded)(x).shape == x.shape


@pytest.mark.parametrize(
    ("ranks", "ranks_of_b"), [((8, 8, 8), (8, 6, 8)), ((8, 8, 9), None)], ids=["A and B", "too large"]
)
def test_ranks_that_no_depth_gives_are_damage(ranks, ranks_of_b, tmp_path):
    written(tmp_path, NUMBERED, ranks, ranks_of_b=ranks_of_b)
    with pytest.raises(CheckpointError, match="of another shape block_"):
        load_adapter(Blocks(NUMBERED), tmp_path)
