"""config.json from a stranger: each wrong value ends at once in an error that names its key."""

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from hylorada_jax.errors import ModelError
from hylorada_jax.models.loading import empty_model

NAN, INFINITY = math.nan, math.inf  # Python's json reads and writes both
NO_INTEGER: tuple[Any, ...] = ("8", True, 1.5, [8], {}, -1, NAN, INFINITY, 10**30)
NO_SIZE = (*NO_INTEGER, 0)
NO_BOOL: tuple[Any, ...] = ("no", 0, 1.0, [])
NO_TEXT: tuple[Any, ...] = (3, True, ["silu"], {})
NO_EPSILON: tuple[Any, ...] = ("1e-6", True, [], NAN, INFINITY, -INFINITY, -1e-6, 0, 1)
NO_FACTOR: tuple[Any, ...] = ("2", True, [], NAN, INFINITY, -2.0, 0)
NO_TOKENS: tuple[Any, ...] = ("</s>", True, 1.5, -1, {}, [[2]], [2, "x"], [2, None], 10**30)
NO_DICT: tuple[Any, ...] = ("linear", 1e6, 3, True, [{}])

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 3,
}  # fmt: skip
QWEN = SMALL | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}
GEMMA = SMALL | {"model_type": "gemma3_text", "head_dim": 4, "rope_local_base_freq": 50.0}
IN_SCALING = {"place": "rope_scaling"}
# Key, its wrong values, and what else the config says.
HOSTILE: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("model_type", (3, True, ["llama"], {}, "", "lläma\0", None), {}),
    ("architectures", ("LlamaForCausalLM", 3, {}, [3], [None]), {}),
    ("tokenizer_class", (3, [], {}), {}),
    ("vocab_size", (*NO_SIZE, 2**25), {}),
    ("hidden_size", (*NO_SIZE, 2**21), {}),
    ("intermediate_size", (*NO_SIZE, 2**21), {}),
    ("num_hidden_layers", (*NO_SIZE, 10**6, 2**31), {}),
    ("num_attention_heads", (*NO_SIZE, 3, 2**13), {}),
    ("num_key_value_heads", (*NO_SIZE, 3, 2**13), {}),
    ("head_dim", (*NO_SIZE, 3, 2**28), {}),
    ("head_dim", (2,), {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("hidden_size", (3,), {}),  # narrower than its heads
    ("hidden_size", (12,), {}),  # heads of an odd width
    ("max_position_embeddings", (*NO_SIZE, 2**31), {}),
    ("hidden_act", (*NO_TEXT, "xielu"), {}),
    ("rms_norm_eps", NO_EPSILON, {}),
    ("initializer_range", ("x", NAN, INFINITY, -0.1), {}),
    ("tie_word_embeddings", NO_BOOL, {}),
    ("attention_bias", NO_BOOL, {}),
    ("mlp_bias", NO_BOOL, {}),
    ("use_sliding_window", NO_BOOL, QWEN),
    ("sliding_window", NO_SIZE, QWEN),
    ("max_window_layers", NO_INTEGER[:-1], QWEN),
    ("eos_token_id", (*NO_TOKENS, 60, [3, 60]), {}),
    ("layer_types", ("full_attention", 3, {}, [3, 3], ["chunked", "chunked"], ["full_attention"], []), QWEN),
    ("rope_theta", (*NO_FACTOR, 1, 1e300), {}),
    ("rope_scaling", NO_DICT, {}),
    ("rope_parameters", NO_DICT, {}),
    ("rope_type", ({"rope_type": []}, {"rope_type": 3}, {"rope_type": "x"}, {"type": True}), IN_SCALING),
    ("rope_theta", ({"rope_theta": "x"}, {"rope_theta": 0}), IN_SCALING),
    ("factor", ({"rope_type": "linear"}, {"rope_type": "linear", "factor": {}}), IN_SCALING),
    ("original_max_position_embeddings", NO_SIZE, {}),
    ("quantization_config", ({}, [], {"bits": 4}), {}),
    ("attention_dropout", (NAN, "0", [], -0.1, 1.0), {}),
    ("rope_parameters", NO_DICT, GEMMA),
    ("rope_scaling", NO_DICT, GEMMA),
    ("rope_scaling", NO_DICT, GEMMA | {"rope_parameters": {"full_attention": {}}}),
    ("rope_local_base_freq", (*NO_FACTOR, 1, 1e300), GEMMA),
    ("sliding_window_pattern", (*NO_INTEGER[:-1], 0), GEMMA),
    ("sliding_window", NO_SIZE, GEMMA),
    ("query_pre_attn_scalar", NO_FACTOR, GEMMA),
    ("final_logit_softcapping", NO_FACTOR, GEMMA),
    ("attn_logit_softcapping", (3.0, "x", []), GEMMA),
    ("hidden_activation", NO_TEXT, GEMMA),
    ("layer_types", ("full_attention", 3, {}, [3, 3], ["chunked", "chunked"], ["full_attention"]), GEMMA),
]  # fmt: skip
# The same of what Gemma 3 says of the rotation in each type of layer.
LAYERED: dict[str, dict[str, tuple[Any, ...]]] = {
    "full_attention": {"rope_theta": NO_FACTOR, "rope_type": ([], 3, "x")},
    "sliding_attention": {"rope_theta": NO_FACTOR, "rope_type": ([], 3, "linear")},
}
for layers, keys in LAYERED.items():
    rest = GEMMA | {"place": "rope_parameters"}
    HOSTILE.append((layers, tuple({layers: value} for value in NO_DICT), rest))
    for key, values in keys.items():
        HOSTILE.append((key, tuple({layers: {key: value}} for value in values), rest))
# The same of the keys of each type of scaling.
SCALINGS: list[tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = [
    ({"rope_type": "linear", "factor": 2.0}, {"factor": NO_FACTOR}),
    ({"rope_type": "dynamic", "factor": 2.0}, {"factor": NO_FACTOR}),
    (
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"factor": NO_FACTOR, "low_freq_factor": (*NO_FACTOR, 4.0, 5.0),
         "high_freq_factor": (*NO_FACTOR, 1.0), "original_max_position_embeddings": NO_INTEGER},
    ),
    (
        {"rope_type": "yarn", "factor": 2.0},
        {"factor": NO_FACTOR, "attention_factor": NO_FACTOR, "beta_fast": (*NO_FACTOR[:-1], 0.5),
         "beta_slow": (*NO_FACTOR[:-1], 40.0), "mscale": NO_FACTOR[:-1], "mscale_all_dim": NO_FACTOR[:-1],
         "truncate": NO_BOOL, "original_max_position_embeddings": NO_INTEGER},
    ),
]  # fmt: skip
for scaling, keys in SCALINGS:
    HOSTILE += [
        (key, tuple({**scaling, key: value} for value in values), {"place": place})
        for place in ("rope_scaling", "rope_parameters")
        for key, values in keys.items()
    ]


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def refused(directory: Path, config: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asserts that a model of this config is refused by the name of a key, and before it is traced."""
    write(directory, config)
    monkeypatch.setattr(jax, "eval_shape", None)
    with pytest.raises(ModelError) as caught:
        empty_model(directory)
    assert key in f"{caught.value.rule} {caught.value.received}"


@pytest.mark.parametrize(("key", "values", "rest"), HOSTILE, ids=lambda row: str(row)[:60])
def test_a_wrong_value_is_refused_by_name(tmp_path, monkeypatch, key, values, rest):
    rest = {"model_type": "llama", **SMALL, **rest}
    place = rest.pop("place", key)
    for value in values:
        refused(tmp_path, {**rest, place: value}, key, monkeypatch)


# Llama 3.1 405B; and the largest of each size at once.
LARGE = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "eos_token_id": [128001, 128008, 128009],
}  # fmt: skip
LARGEST = {
    "model_type": "llama", "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20,
    "num_hidden_layers": 1024, "num_attention_heads": 2**12, "max_position_embeddings": 2**31 - 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LARGE, 405_853_388_800),
        (LARGEST, 2**24 * 2**20 * 2 + 1024 * (4 * 2**40 + 3 * 2**40 + 2 * 2**20) + 2**20),
    ],
    ids=["405B", "largest"],
)
def test_a_config_alone_says_how_large_a_model_is(tmp_path, config, parameters):
    model = empty_model(write(tmp_path, config))
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == parameters


GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 60, "n_embd": 24, "n_layer": 2,
    "n_head": 4, "n_positions": 20,
}  # fmt: skip
NEO = {
    "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "hidden_size": 24, "num_layers": 2,
    "num_heads": 4, "attention_types": [[["local", "global"], 1]], "vocab_size": 60,
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 60, "d_model": 24,
    "d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 4,
}  # fmt: skip
MARIAN = {
    "model_type": "marian", "architectures": ["MarianMTModel"], "vocab_size": 60, "d_model": 24,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 20, "pad_token_id": 59,
    "decoder_start_token_id": 59, "forced_eos_token_id": 0,
}  # fmt: skip
HOSTILE_FLAX: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("architectures", (None, [], ["AutoModel"], ["PreTrainedModel"], ["BertModel"], ["__doc__"]), GPT2),
    ("vocab_size", (*NO_SIZE, 2**25), GPT2),
    ("n_embd", (*NO_SIZE, 25, 2**28), GPT2),
    ("n_layer", (*NO_SIZE, 10**6), GPT2),
    ("n_head", (*NO_SIZE, 5, 2**28), GPT2),
    ("n_inner", (*NO_SIZE, 2**28), GPT2),
    ("n_positions", (*NO_SIZE, 2**28), GPT2),
    ("activation_function", (*NO_TEXT, "xielu"), GPT2),
    ("layer_norm_epsilon", NO_EPSILON, GPT2),
    ("resid_pdrop", (NAN, -0.5, 2, "x"), GPT2),
    ("tie_word_embeddings", NO_BOOL, GPT2),
    ("scale_attn_weights", NO_BOOL, GPT2),
    ("eos_token_id", NO_TOKENS, GPT2),
    ("num_labels", (-1, 10**9, "x"), GPT2),
    ("num_beams", (0, 10**6, "x"), GPT2),
    ("id2label", (3, [], {"x": "y"}), GPT2),
    ("pruned_heads", (3, {"x": [1]}), GPT2),
    ("torch_dtype", ("no_dtype", 3, []), GPT2),
    ("quantization_config", (3, "x"), GPT2),
    ("problem_type", ("x",), GPT2),  # which transformers' class itself refuses, by a ValueError
    *((name, (1, {}), GPT2) for name in ("to_dict", "__class__", "__dict__", "attribute_map")),
    ("use_return_dict", ("x", True), GPT2),  # a property that cannot be set
    ("attention_types", (3, [], [[["local"], 10**9]], [[[], 2]], [["local", 2]], [[["x"], 2]]), NEO),
    ("num_layers", (3,), NEO),  # unlike the attention types
    ("num_heads", (5,), NEO),
    ("d_kv", (*NO_SIZE, 2**28), T5),
    ("num_decoder_layers", (*NO_SIZE, 10**6), T5),
    ("relative_attention_num_buckets", (*NO_SIZE, 2, 10**9), T5),
    ("relative_attention_max_distance", (*NO_SIZE, 16), T5),
    ("feed_forward_proj", (3, "a-b-c"), T5),
    ("encoder_layers", (*NO_SIZE, 10**6), MARIAN),
    ("decoder_attention_heads", (*NO_SIZE, 5), MARIAN),
    ("max_position_embeddings", (2**14,), MARIAN | {"d_model": 2**10}),  # whose sines are made one by one
    ("decoder_start_token_id", ("x", 60, -1, []), MARIAN),
    ("forced_bos_token_id", ("x", 60), MARIAN),
]  # fmt: skip


@pytest.mark.parametrize(("key", "values", "rest"), HOSTILE_FLAX, ids=lambda row: str(row)[:60])
def test_a_wrong_value_of_a_flax_model_is_refused_by_name(tmp_path, monkeypatch, key, values, rest):
    pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError)
    for value in values:
        refused(tmp_path, {**rest, key: value}, key, monkeypatch)


def test_what_transformers_logs_is_printable_from_the_first_config_on(tmp_path, monkeypatch):
    pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError)
    import transformers

    log = transformers.logging.get_logger("transformers.configuration_utils")
    written = io.StringIO()
    handlers = [logging.StreamHandler(written)]
    monkeypatch.setattr(transformers.logging.get_logger(), "handlers", handlers)
    empty_model(write(tmp_path, GPT2))
    log.error("Can't set %s", "\x1b]0;x\x07")
    assert r"Can't set \x1b]0;x\x07" in written.getvalue()
    assert "\x1b" not in written.getvalue()


@pytest.mark.parametrize("config", [GPT2, NEO, T5, MARIAN], ids=lambda config: config["model_type"])
def test_these_configs_are_right_otherwise(tmp_path, config):
    pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError)
    assert empty_model(write(tmp_path, config)).config.vocab_size == 60


def test_a_flax_model_has_no_more_layers_than_its_weights(tmp_path, monkeypatch):
    pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError)
    for layers in range(2):
        save_file({f"h.{layers}.ln_1.bias": np.ones(24)}, tmp_path / f"model-{layers}.safetensors")
    assert empty_model(write(tmp_path, GPT2)).config.vocab_size == 60
    refused(tmp_path, GPT2 | {"n_layer": 100}, "n_layer=100", monkeypatch)
