"""No option of a model's config is ignored in silence: another value changes what we read, or is refused."""

import json
from typing import Any

import pytest
import transformers
from transformers.utils.quantization_config import QuantizationMethod

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.loading import load_model
from parity_tests.families import FAMILIES

# What decides no number of these families' forward pass: names in the file, what is for generation, for the
# layout of the output, for devices, and for other kinds of models.
IDLE = {
    "add_cross_attention", "cross_attention_hidden_size", "is_decoder", "is_encoder_decoder",
    "_name_or_path", "architectures", "base_model_tp_plan", "base_model_pp_plan", "bos_token_id", "dtype",
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_bfloat16", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict", "problem_type", "finetuning_task", "prefix",
    "id2label", "label2id", "task_specific_params", "chunk_size_feed_forward", "pruned_heads",
    "tf_legacy_loss", "pretraining_tp", "model_type", "tie_encoder_decoder",
    "router_aux_loss_coef",  # of a loss that is refused
    "attention_dropout",  # a frozen base runs without it, in training too
}  # fmt: skip
# transformers' own class does not read them.
IGNORED = {
    ("gemma", "hidden_activation"),
    ("phi3", "embd_pdrop"),
    ("gemma3_text", "_sliding_window_pattern"),
    ("qwen2_moe", "sliding_window"),  # without use_sliding_window, which is refused
    ("qwen2_moe", "max_window_layers"),
    ("gemma4_unified_text", "use_double_wide_mlp"),  # of layers that share keys and values, of which are none
}
# Read only where the other, which transformers derives from it, is absent.
DERIVED = {"max_window_layers": "layer_types", "no_rope_layer_interval": "no_rope_layers"}


def settings(family: str) -> dict[str, Any]:
    """A config of the family with its options away from their defaults, as a file has it."""
    return FAMILIES[family]().config.to_dict()


def another(key: str, value: Any) -> Any:
    """A value of the same kind that is not this one."""
    match value:
        case bool():
            return not value
        case int():
            return 2 if value == 1 else 1
        case float():
            return value / 2 + 0.125
        case str():
            return "relu" if value != "relu" else "silu"
        case [int() as only] if not isinstance(only, bool):
            return [only + 1]
        case [bool(), *_] | [int(), *_] | [str(), *_]:
            return value[::-1]
        case dict():
            return {**value, "an unknown key": 1.0}
        case _:
            return {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}.get(key, 3)


METHODS = [method.value for method in QuantizationMethod]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_is_quantised_is_refused_by_its_method(method, tmp_path):
    """From the config alone: there are no weights."""
    families: list[dict[str, Any]] = [
        {"model_type": "llama"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    ]
    if method != "mxfp4":
        families.append({"model_type": "gpt_oss"})
    for family in families:
        said = family | {"quantization_config": {"quant_method": method, "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(ModelError, match=rf"'{method}(_8bit)?'\n.*quantised from; --base-dtype nf4"):
            load_model(tmp_path)


@pytest.mark.parametrize(("family", "bits"), [("gpt2", 4), ("llama", 8)])
def test_of_bitsandbytes_our_decoder_reads_4_bits_alone(family, bits, tmp_path):
    said = {"model_type": family, "quantization_config": {f"load_in_{bits}bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=f"'bitsandbytes_{bits}bit'"):
        load_model(tmp_path)


GENERATION = vars(transformers.GenerationConfig())
ROWS = [
    (family, key)
    for family in DECODERS
    if family in FAMILIES  # transformers 4.57 lacks some
    for key in settings(family)
    if not (key in IDLE or key in GENERATION or (family, key) in IGNORED)
]


@pytest.mark.parametrize(("family", "key"), ROWS)
def test_an_option_is_used_or_refused(family, key):
    hf = {name: value for name, value in settings(family).items() if name != DERIVED.get(key)}
    before = DecoderConfig.from_hf(hf)
    try:
        after = DecoderConfig.from_hf(hf | {key: another(key, hf[key])})
    except ModelError:
        return
    assert after != before
