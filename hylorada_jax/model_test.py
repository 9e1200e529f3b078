import dataclasses
import functools
import pickle
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax import HyLoRADAConfig, HyLoRADAModel
from hylorada_jax.adapter_bank import AdapterBank
from hylorada_jax.errors import CheckpointError, ModelError, TargetError
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.saved import opening
from hylorada_jax.saved.adapter_files import write_adapter
from hylorada_jax.saved.inspection import inspect_adapter
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.surgery import build, fit, layout

IDS = jnp.asarray(np.random.default_rng(9).integers(0, 40, (2, 6)))
METHODS = ("lora", "dora", "hylorada_v1")


def shaken(params):
    """Weights with no zero bias and no unit norm, under which a lost term would show."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.1 * rng.normal(size=a.shape), a.dtype), params)


@functools.cache
def qwen2(**settings):
    shape = {"model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    base = CausalLM.from_config(DecoderConfig.from_hf(shape | settings), jax.random.key(0))
    return base.with_params(shaken(base.params))


def gpt2():
    hf = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers
    config = hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = hf.FlaxGPT2LMHeadModel(config)
    model.params = shaken(model.params)
    return model


@pytest.fixture(scope="module", params=[qwen2, gpt2], ids=["qwen2", "gpt2"])
def base(request):
    return request.param()


def moved(model, scale=0.1):
    """Adapters away from their start."""
    rng = np.random.default_rng(0)
    flat = layout.flatten(model.sites, model.adapters)
    flat = {
        name: (leaf + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype) for name, leaf in flat.items()
    }
    return layout.unflatten(model.sites, flat)


@pytest.mark.parametrize("method", METHODS)
def test_life_of_an_adapter(base, method, tmp_path):
    model = HyLoRADAModel(base, HyLoRADAConfig(method=method, lora_rank=4))
    plain = model.base(IDS).logits
    # To the rounding of float32 through the layers: the model as it was given (in HF's GPT-2 it is our
    # function that attends), and the identity at the start.
    np.testing.assert_allclose(plain, base(IDS).logits, atol=2e-6)
    np.testing.assert_allclose(model(IDS).logits, plain, atol=2e-6)

    model.adapters = moved(model)
    adapted = model(IDS).logits
    assert np.abs(adapted - plain).max() > 1e-2
    with model.disable_adapter():
        np.testing.assert_array_equal(model(IDS).logits, plain)
    np.testing.assert_array_equal(model(IDS).logits, adapted)
    np.testing.assert_allclose(model.merge_and_unload()(IDS).logits, adapted, atol=1e-5)
    np.testing.assert_array_equal(model.base(IDS).logits, plain)

    model.save_pretrained(tmp_path / "adapter")
    again = HyLoRADAModel.from_pretrained(base, tmp_path / "adapter")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.adapters, model.adapters)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.adapters)) == model.num_trainable


def test_an_adapter_whose_depths_were_read_otherwise_keeps_its_ranks(tmp_path):
    """By depth they would be 4, 3 and 2 today, and each layer has the full rank."""
    uniform = HyLoRADAConfig(method="lora", lora_rank=4)
    model = HyLoRADAModel(qwen2(), uniform)
    model.adapters = moved(model)
    by_depth = dataclasses.replace(uniform, rank_strategy="decreasing")
    write_adapter(tmp_path, layout.flatten(model.sites, model.adapters), by_depth, model.identity())
    again = HyLoRADAModel.from_pretrained(qwen2(), tmp_path)
    assert again.config == uniform
    jax.tree.map(np.testing.assert_array_equal, again.adapters, model.adapters)
    AdapterBank(again).load("other", tmp_path)
    with pytest.raises(CheckpointError, match="rank_strategy"):
        AdapterBank(HyLoRADAModel(qwen2(), by_depth)).load("other", tmp_path)
    assert {layer["rank"] for layer in inspect_adapter(open_adapter(tmp_path))["linear"]} == {4}


def test_a_pickled_model_is_the_same_with_programs_of_its_own():
    model = HyLoRADAModel(qwen2(), HyLoRADAConfig(method="lora", lora_rank=2))
    model.adapters = moved(model)
    expected = model(IDS).logits
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(IDS).logits, expected)
    assert again._jitted is not model._jitted


def test_adapters_of_another_model_are_refused():
    """More leaves would be left out of all that is computed and saved, and fewer not found."""
    base = qwen2()
    model = HyLoRADAModel(base, HyLoRADAConfig(method="lora", lora_rank=2))
    before = model.adapters
    for other in ({"lora_rank": 3}, {"target_modules": "all-linear"}, {"target_modules": ("q_proj",)}):
        config = HyLoRADAConfig(method="lora", **{"lora_rank": 2} | other)
        with pytest.raises(ModelError, match="leaves and shapes that the model was adapted with"):
            model.adapters = HyLoRADAModel(base, config).adapters
    assert model.adapters is before
    model.adapters = jax.tree.map(np.asarray, before)


def test_tokens_may_be_lists(base):
    model = HyLoRADAModel(base, HyLoRADAConfig(lora_rank=2))
    listed = model([[1, 2, 3]])  # type: ignore[arg-type]
    np.testing.assert_array_equal(listed.logits, model(jnp.array([[1, 2, 3]])).logits)


def test_the_frozen_tree_is_neither_copied_nor_cast():
    base = qwen2()
    model = HyLoRADAModel(base, HyLoRADAConfig(lora_rank=2))
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(base.params), jax.tree.leaves(model.frozen["params"]), strict=True)
    )


def test_a_saved_adapter_is_opened_and_planned_once_and_no_fresh_one_is_made(tmp_path, monkeypatch):
    HyLoRADAModel(qwen2(), HyLoRADAConfig(lora_rank=2)).save_pretrained(tmp_path)
    calls = {}
    for module, name in ((opening, "open_adapter"), (fit, "plan"), (build, "build_adapters")):
        calls[name] = mock.Mock(wraps=getattr(module, name))
        monkeypatch.setattr(module, name, calls[name])
    calls["modules_of"] = mock.Mock(wraps=fit.modules_of)
    for module in (opening, fit):
        monkeypatch.setattr(module, "modules_of", calls["modules_of"])

    HyLoRADAModel.from_pretrained(qwen2(), tmp_path)
    counts = {name: call.call_count for name, call in calls.items()}
    assert counts == {"open_adapter": 1, "modules_of": 1, "plan": 1, "build_adapters": 0}
    HyLoRADAModel(qwen2(), HyLoRADAConfig(lora_rank=2))
    assert calls["build_adapters"].call_count == 1


def test_trainable_parameters_are_printed(capsys):
    model = HyLoRADAModel(qwen2(), HyLoRADAConfig(method="lora", lora_rank=2))
    model.print_trainable_parameters()
    # q: 2·(16+16), v: 2·(16+8), three layers.
    assert capsys.readouterr().out.startswith("trainable params: 336 || all params: ")


def test_bad_bases_and_targets_are_refused():
    with pytest.raises(ModelError, match="load_model"):
        HyLoRADAModel("smollm2-135m", HyLoRADAConfig())
    with pytest.raises(TargetError, match="q_proj"):
        HyLoRADAModel(qwen2(), HyLoRADAConfig(target_modules="q_prj"))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    HyLoRADAModel(qwen2(), HyLoRADAConfig()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="layers_sha256"):
        HyLoRADAModel.from_pretrained(qwen2(intermediate_size=32), tmp_path)
    with pytest.raises(CheckpointError, match="overwrit"):
        HyLoRADAModel(qwen2(), HyLoRADAConfig()).save_pretrained(tmp_path)
