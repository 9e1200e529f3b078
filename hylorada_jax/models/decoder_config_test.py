import subprocess
import sys
from dataclasses import replace

import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.families.family import Keys

LLAMA = {"model_type": "llama"}


def test_gemmas_gelu_is_its_approximation_as_in_transformers_5():
    assert (
        DecoderConfig.from_hf({"model_type": "gemma", "hidden_act": "gelu"}).hidden_act == "gelu_pytorch_tanh"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "falcon"}, "falcon"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 4096}, "mistral"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window=None, and 13 of 26"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "sliding_attention",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "for each type of layer",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "longrope", "type": "linear", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"factor": 2.0}}, "rope type"),
        ({"rope_scaling": {"type": "linear"}}, "missing required field `factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "unknown field `beta_fast`"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1}},
            "unknown field `low_freq_factor`",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 7}},
            "unknown field `original_max_position_embeddings`",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"is_causal": False}, "is_causal"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(change, words):
    with pytest.raises(ModelError) as error:
        DecoderConfig.from_hf({**LLAMA, **change})
    assert words in str(error.value)


def test_a_family_may_have_what_others_are_refused_for(monkeypatch):
    class Capped(Keys, frozen=True, kw_only=True):
        attn_logit_softcapping: float | None = None

    monkeypatch.setitem(DECODERS, "capped", replace(DECODERS["llama"], keys=Capped))
    capped = {"model_type": "capped", "attn_logit_softcapping": 50.0}
    assert DecoderConfig.from_hf(capped).model_type == "capped"
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        DecoderConfig.from_hf({**capped, "final_logit_softcapping": 30.0})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_gpt_oss_is_stretched_where_its_config_says_nothing_of_it(key):
    """transformers 5 reads an empty dictionary so, and 4.57 not at all."""
    said = {"model_type": "gpt_oss", "num_hidden_layers": 2}
    assert DecoderConfig.from_hf({**said, key: {}}) == DecoderConfig.from_hf(said)
    assert DecoderConfig.from_hf(said).rope_scaling.rope_type == "yarn"


def test_settings_that_mean_off_are_accepted():
    off = {
        "quantization_config": None,
        "attention_dropout": 0.1,  # the frozen base has none
        "rope_interleaved": False,
        "rope_scaling": {"rope_type": "default"},
    }
    assert DecoderConfig.from_hf({**LLAMA, **off}) == DecoderConfig.from_hf(LLAMA)


# A file that says everything, and one null at a time in it.
SAID = {
    "vocab_size": 7, "hidden_size": 24, "intermediate_size": 9, "num_hidden_layers": 3, "head_dim": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "relu", "rms_norm_eps": 1e-3,
    "max_position_embeddings": 99, "rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "initializer_range": 0.5,
    "eos_token_id": 3, "layer_types": ["full_attention"] * 3, "use_sliding_window": True, "sliding_window": 4,
    "max_window_layers": 1, "attention_dropout": 0.0, "partial_rotary_factor": 1.0, "is_causal": True,
}  # fmt: skip
NULL_IS_A_VALUE = {"num_key_value_heads": 6, "sliding_window": None, "eos_token_ids": ()}


@pytest.mark.parametrize("key", SAID)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_null_counts_as_an_absent_key_or_is_a_value(family, key):
    said = {**SAID, "model_type": family}
    if family in ("llama", "mistral") or key == "num_hidden_layers":
        del said["layer_types"]
    if family == "llama":
        del said["sliding_window"]
    config = DecoderConfig.from_hf({**said, key: None})
    if (field := {"eos_token_id": "eos_token_ids"}.get(key, key)) in NULL_IS_A_VALUE:
        assert getattr(config, field) == NULL_IS_A_VALUE[field]
    else:
        assert config == DecoderConfig.from_hf({k: value for k, value in said.items() if k != key})


def test_configs_hash_by_value():
    assert len({DecoderConfig.from_hf(LLAMA), DecoderConfig.from_hf(dict(LLAMA))}) == 1


@pytest.mark.parametrize(("raw", "tokens"), [(None, ()), (7, (7,)), ([7, 8], (7, 8))])
def test_end_tokens(raw, tokens):
    assert DecoderConfig.from_hf({**LLAMA, "eos_token_id": raw}).eos_token_ids == tokens


def test_the_file_imports_no_framework():
    code = (
        "import sys, hylorada_jax.models.decoder_config;"
        "print({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
