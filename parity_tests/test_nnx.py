"""An NNX model of somebody's own beside our Linen decoder and PyTorch, on the same weights."""

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import PeftModel

from hylorada_jax import CausalLM, HyLoRADAConfig, HyLoRADAModel
from hylorada_jax.errors import CheckpointError, ModelError
from hylorada_jax.exchange.peft_export import export_peft
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.nnx import AdapterParam, adapt, load_adapter, merge, save_adapter, tokens
from hylorada_jax.nnx.adapting import adaptation_of, adapters_of
from hylorada_jax.nnx.adapting_test import moved, output
from hylorada_jax.nnx.finding import find_modules
from hylorada_jax.surgery import modules as surgery
from hylorada_jax.surgery.layout import flatten, unflatten
from parity_tests.tolerances import MODEL, relative_error

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples/nnx_loop.py"))
SHAPE = {
    "model_type": "llama", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
CONFIG = DecoderConfig.from_hf(SHAPE)
IDS = jax.random.randint(jax.random.key(1), (2, 12), 0, 29)


@pytest.fixture(scope="module")
def base():
    return CausalLM.from_config(CONFIG, jax.random.key(0))


def weights_of(base):
    """The weights of our decoder as Hugging Face's models have them, by their modules' names."""
    ours = surgery.modules_of(base)
    weights = {
        name: module.weight(base.params, layer)
        for module in ours.linears
        for layer, name in enumerate(module.names)
    }
    for module in (*ours.embeddings, *ours.norms):
        (leaf,) = surgery.subtree(base.params, module.path).values()
        weights |= dict(zip(module.names, leaf if module.stacked else [leaf], strict=True))
    return weights


def transformer(base):
    """The example's model with the weights of our decoder, found by their names."""
    model, weights = EXAMPLE["Transformer"](29, 16, 2, 24, 2, rngs=nnx.Rngs(0)), weights_of(base)
    theirs, found = find_modules(model)
    for own in (*theirs.linears, *theirs.embeddings, *theirs.norms):
        weight = jnp.asarray(weights.pop(own.names[0]))
        found[own.path].kernel.set_value(weight.T if own in theirs.linears else weight)
    assert not weights
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.RMSNorm):
            module.epsilon = CONFIG.rms_norm_eps
    return model


METHODS = [
    HyLoRADAConfig(method="lora", lora_rank=2),
    HyLoRADAConfig(method="hylorada_v1", rank_strategy="decreasing", target_modules="all-linear"),
    HyLoRADAConfig(method="dora", lora_rank=2, sparse_enabled=True, sparse_adapter_dim=4),
    HyLoRADAConfig(method="longlora", lora_rank=2, s2_group_size=4),
    HyLoRADAConfig(method="hylorada", lora_rank=2),
    HyLoRADAConfig(method="hylorada_v2", lora_rank=2, structure_dim=4, structure_seq_len=12),
]


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=pytest.mark.apart if c.method in ("dora", "longlora") else ()) for c in METHODS],
    ids=lambda config: config.method,
)
def test_an_adapter_goes_to_linen_and_back(base, config, tmp_path):
    model = moved(adapt(transformer(base), config, nnx.Rngs(2)))
    model.eval()
    save_adapter(model, tmp_path / "nnx", base_config=CONFIG)
    linen = HyLoRADAModel.from_pretrained(base, tmp_path / "nnx")
    logits = output(model, IDS)
    # Two programs of the same formulas in float32, over two layers.
    assert relative_error(logits, linen(IDS).logits) <= 1e-5
    assert relative_error(logits, base(IDS).logits) > 1e-2
    linen.save_pretrained(tmp_path / "linen")
    for base_config in (None, CONFIG):
        back = load_adapter(transformer(base), tmp_path / "linen", base_config=base_config)
        same = jax.tree.map(jnp.array_equal, *(nnx.state(m, AdapterParam) for m in (back, model)))
        assert all(jax.tree.leaves(same))
    if config.method in ("lora", "hylorada_v1"):
        assert relative_error(output(merge(back), IDS), logits) <= 1e-5
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("nnx", "linen"))
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def torch_model(base):
    """transformers' model of the same weights."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    tensors = {f"{name}.weight": torch.tensor(np.asarray(w)) for name, w in weights_of(base).items()}
    assert model.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # it is tied
    return model


@pytest.mark.parametrize("config", METHODS[:2], ids=lambda config: config.method)
def test_peft_takes_what_nnx_trained(base, torch_model, config, tmp_path):
    model = moved(adapt(transformer(base), config, nnx.Rngs(2)))
    save_adapter(model, tmp_path / "nnx", base_config=CONFIG)
    export_peft(HyLoRADAModel.from_pretrained(base, tmp_path / "nnx"), tmp_path / "peft")
    theirs = PeftModel.from_pretrained(torch_model, tmp_path / "peft")
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(IDS, np.int64))).logits
    theirs.unload()
    assert relative_error(output(model, IDS), logits.numpy()) <= 1e-5


# Of the others each leaf is in one of these, or in the layers' own parity.
@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(METHODS[2], sparse_temperature=0.5), *METHODS[3:]],
    ids=lambda config: config.method,
)
def test_gradients_of_training_are_linens(base, config):
    given: dict[str, Any] = {"structure_ids": IDS % 8} if config.use_hylorada_v2 else {}

    def of_nnx(model):
        with tokens(**given):
            return jnp.sum(jnp.sin(model(IDS)))

    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
        base, plain = base.with_params(wide(base.params)), transformer(base)
        nnx.update(plain, wide(nnx.state(plain, nnx.Param)))
        plain.model.embed_tokens.dtype = jnp.float64  # else it computes in the dtype that it was made in
        model, linen = moved(adapt(plain, config, nnx.Rngs(2))), HyLoRADAModel(base, config)
        gradient = nnx.jit(nnx.grad(of_nnx, argnums=nnx.DiffState(0, AdapterParam)))(model)
        adaptation, found = adaptation_of(model)
        adapters = unflatten(linen.sites, flatten(adaptation.sites, adapters_of(model, adaptation, found)))
        of_linen = lambda a: jnp.sum(jnp.sin(linen.apply(a, IDS, train=True, **given).logits))
        expected = flatten(linen.sites, jax.jit(jax.grad(of_linen))(adapters))
        nnx.update(model, gradient)
        got = flatten(adaptation.sites, adapters_of(model, *adaptation_of(model)))
    assert set(got) == set(expected)
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        if name.endswith(".beta"):  # which the softmax does not see: its own is zero
            got[name], value = np.append(got[name], largest), np.append(value, largest)
        assert np.any(value), name
        assert relative_error(got[name], value) <= MODEL["float64"], name


def test_another_checkpoints_adapter_is_refused(base, tmp_path):
    save_adapter(adapt(transformer(base), METHODS[0], nnx.Rngs(2)), tmp_path, base_config=CONFIG)
    other = DecoderConfig.from_hf(SHAPE | {"rope_theta": 5e5})
    with pytest.raises(CheckpointError, match="config_sha256"):
        load_adapter(transformer(base), tmp_path, base_config=other)


def test_linens_call_says_which_is_nnxs(base):
    with pytest.raises(ModelError, match=r"hylorada_jax\.nnx\.adapt"):
        HyLoRADAModel(transformer(base), METHODS[0])


@pytest.mark.apart
def test_the_loop_of_an_nnx_model_learns_its_batch_and_saves_the_adapter(base, tmp_path):
    model = transformer(base)
    losses = EXAMPLE["train"](model, IDS, tmp_path / "run", steps=20)
    assert losses[-1] < losses[0] - 0.1
    loaded = load_adapter(transformer(base), tmp_path / "run")
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    assert relative_error(loaded(IDS), base(IDS).logits) > 1e-3


@pytest.mark.apart
def test_the_lines_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs/nnx.md").read_text(encoding="utf-8")
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, scope)
    assert {*scope["gradient"]["layers"]} == {0, 2}
    # The merged model computes what the trained one does, up to float32's roundings.
    np.testing.assert_allclose(scope["merged"](scope["x"]), scope["model"](scope["x"]), rtol=1e-5, atol=1e-5)
