"""The names that tests of files go through, and what reads a path as the user means it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.io.files import user_path
from hylorada_jax.io.merged import write_merged
from hylorada_jax.io.saved_adapter import base_name
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer import load_tokenizer

# What glob, fnmatch, format, URLs, shells and printf would read; the longest name; bytes that are not UTF-8.
NAMES = {
    "pattern": "lr=[1e-4,2e-4]",
    "signs": "-*?[!a]{0}%s%20 #~&|'\"\\\n=,;:gs:é🦜",
    "long": "x" * 255,
    "bytes": "\udcff",
}


def test_only_a_home_directory_is_read_into_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/runs") == Path("/home/me/runs")
    for name in ("~no-such-user", "a/~", *NAMES.values()):
        assert user_path(name) == Path(name)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_of_a_model_an_adapter_and_a_merged_checkpoint(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    directory = Path(name)
    directory.mkdir()
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 4}
    config = {"model_type": "llama", "vocab_size": 5, "tie_word_embeddings": True, **shape}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    weights = {"model.embed_tokens.weight": (5, 8), "model.norm.weight": (8,)}
    for layer, (rows, columns) in {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 8), "mlp.gate_proj": (4, 8), "mlp.up_proj": (4, 8), "mlp.down_proj": (8, 4),
    }.items():  # fmt: skip
        weights[f"model.layers.0.{layer}.weight"] = (rows, columns)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"model.layers.0.{norm}.weight"] = (8,)
    save_file({key: np.ones(size, np.float32) for key, size in weights.items()}, "model.safetensors")
    shutil.move("model.safetensors", directory)

    adapter, merged = Path("adapters") / name / name, Path("merged") / name
    model = HyLoRADAModel(load_model(name), HyLoRADAConfig(method="lora"))
    model.save_pretrained(adapter, weights=True)
    again = HyLoRADAModel.from_pretrained(load_model(f"./{name}/"), adapter, check_weights=True)
    jax.tree.map(np.testing.assert_array_equal, again.adapters, model.adapters)
    write_merged(base_name(adapter), adapter, merged, check_weights=True)
    fresh = load_model(merged).params
    jax.tree.map(np.testing.assert_array_equal, fresh, model.base.params)  # B starts at zero
    assert load_tokenizer(merged).encode("a") == [0]


def test_a_text_that_is_no_path_is_an_error_of_ours():
    with pytest.raises(ModelError, match="no such directory"):
        find_source("a text that was pasted by mistake " * 200)
