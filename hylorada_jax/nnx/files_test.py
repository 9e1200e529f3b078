import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, ModelError
from hylorada_jax.nnx import AdapterParam, adapt, load_adapter, save_adapter
from hylorada_jax.nnx.adapting_test import METHODS, config_of, made, moved


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
    ],
    ids=["shapes", "paths", "adapted", "no model"],
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
