"""Oracle: the same model on the numbers that a quantised base stands for."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.exchange.merged import write_merged
from hylorada_jax.math.quantized import dtype_name, plain
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.loading import empty_model, load_model
from hylorada_jax.models.loading_test import MIXTURE, edit, save_model
from hylorada_jax.models.quantize import quantize
from hylorada_jax.models.source import find_source
from hylorada_jax.models.weights_digest import files_digest, tree_digest
from hylorada_jax.placement.placement import Placement, parse_mesh
from hylorada_jax.trees import is_quantized

pytest.importorskip("qwix")
SHAPE = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
IDS = jnp.arange(24).reshape(2, 12) % 40
# Every linear layer of `save_model`'s has 8 or 16 inputs.
FILES: dict[str, Any] = {"intermediate_size": 16}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


# With every part; and with leaves of the base that train.
@pytest.mark.parametrize(("method", "base_dtype"), [("hylorada", "nf4"), ("longlora", "int8")])
def test_adapters_see_the_numbers_of_a_quantised_base(method, base_dtype):
    config = HyLoRADAConfig(
        method=method,
        lora_rank=2,
        target_modules=("k_proj", "down_proj"),
        s2_group_size=4,
        sparse_adapter_dim=4,
    )
    with jax.enable_x64(True):
        decoder = DecoderConfig.from_hf(SHAPE)
        base = CausalLM.from_config(decoder, jax.random.key(0), dtype="float64", remat="full")
        base = base.with_params(quantize(base.params, base_dtype))
        model, rng = HyLoRADAModel(base, config), np.random.default_rng(0)
        adapters = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), model.adapters)

        @jax.jit
        def measured(adapters, frozen):
            loss = lambda adapters: jnp.mean(
                model.apply(adapters, IDS, frozen=frozen, train=True).logits[..., 0] ** 2
            )
            return jax.value_and_grad(loss)(adapters)

        got, expected = measured(adapters, model.frozen), measured(adapters, plain(model.frozen))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), got, expected)
        # What a fresh adapter starts from: ‖W‖ is that of these numbers.
        fresh = HyLoRADAModel(base.with_params(plain(base.params)), config)
        jax.tree.map(np.testing.assert_array_equal, model.adapters, fresh.adapters)


@pytest.mark.parametrize(("base_dtype", "kind"), [("int8", {}), ("nf4+head", MIXTURE | UNTIED)])
def test_a_model_is_quantised_as_it_is_read(base_dtype, kind, tmp_path):
    path = save_model(tmp_path / "m", **FILES, **kind)
    loaded = load_model(path, dtype="bfloat16", base_dtype=base_dtype)
    expected = quantize(load_model(path).params, base_dtype)
    placed = load_model(
        path, dtype="bfloat16", base_dtype=base_dtype, placement=Placement(parse_mesh("fsdp=1,tensor=1"))
    )
    empty = empty_model(path, dtype="bfloat16", base_dtype=base_dtype)
    codes = lambda params: {
        path: leaf.qvalue for path, leaf in flatten_dict(params).items() if is_quantized(leaf)
    }
    assert len(codes(loaded.params)) == 7 + base_dtype.endswith("head")
    jax.tree.map(np.testing.assert_array_equal, codes(loaded.params), codes(expected))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, placed.params)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), loaded.params, empty.params)
    assert loaded.params["model"]["norm"]["scale"].dtype == "bfloat16"
    assert dtype_name(loaded.params) == f"bfloat16+{base_dtype}"
    assert tree_digest(loaded.params) == files_digest(find_source(path), f"bfloat16+{base_dtype}")


def test_an_adapter_is_merged_into_what_it_was_trained_on(tmp_path):
    path = save_model(tmp_path / "m", **FILES, **MIXTURE, **UNTIED)
    base = load_model(path, base_dtype="nf4+head")
    config = HyLoRADAConfig(method="dora", lora_rank=2, target_modules=("k_proj", "w2", "1.w1"))
    model = HyLoRADAModel(base, config)
    model.adapters = jax.tree.map(lambda x: x + 0.1, model.adapters)
    expected = np.asarray(model(IDS % 11).logits)
    rounding = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}  # in float32, of sums in another order
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged(IDS % 11).logits, expected, **rounding)
    assert dtype_name(merged.params) == "float32"

    for digest in (True, False):
        adapter, output = tmp_path / f"adapter {digest}", tmp_path / f"merged {digest}"
        model.save_pretrained(adapter, weights=digest)
        write_merged(path, adapter, output, check_weights=digest)
        np.testing.assert_allclose(load_model(output)(IDS % 11).logits, expected, **rounding)


def test_a_quantised_base_generates_what_its_numbers_do(tmp_path):
    model = load_model(save_model(tmp_path / "m", **FILES, **UNTIED), base_dtype="int8+head")
    numbers = model.with_params(plain(model.params))
    prompts = [[1, 2, 3], [4]]
    assert model.generate(prompts, max_new_tokens=6) == numbers.generate(prompts, max_new_tokens=6)


def test_what_cannot_be_quantised_is_refused(tmp_path):
    path = save_model(tmp_path / "m", **FILES)
    with pytest.raises(ConfigError, match=r"int8, nf4, int8\+head, nf4\+head or None"):
        load_model(path, base_dtype="int4")
    with pytest.raises(ConfigError, match="head that is the embedding"):
        empty_model(path, base_dtype="nf4+head")
    with pytest.raises(ModelError, match="not quantised again"):
        quantize(load_model(path, base_dtype="nf4").params, "nf4")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="Only our decoder"):
        empty_model(tmp_path / "gpt2", base_dtype="nf4")
    name = "model.layers.1.mlp.down_proj.weight"
    edit(path, **{name: np.full((8, 16), np.nan, np.float32)})
    with pytest.raises(ModelError, match=name):
        load_model(path, base_dtype="nf4")
