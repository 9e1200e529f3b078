"""Base models as we load them against transformers' torch models."""

import math
import pydoc_data.topics
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.gguf_test import write_gguf
from hylorada_jax.models.hf.faults import check_hf_flax
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.saved.base_identity import base_identity
from parity_tests.hf_weights import random_torch_model
from parity_tests.memory import needs_proc, peak_memory
from parity_tests.tolerances import DECODER, MODEL, relative_error

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_theta": 5e5,
              "tie_word_embeddings": True},
    "mistral": {"head_dim": 16, "sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 5, "pad_token_id": 0, "eos_token_id": 2},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "logits_scaling": 4.0, "attention_dropout": 0.1, "tie_word_embeddings": True},
    "olmo2": {"head_dim": 8, "pad_token_id": 0, "eos_token_id": 2},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
}  # fmt: skip
SMALL = {"vocab_size": 64, "max_position_embeddings": 64, "hidden_size": 32}
FLAX: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoForCausalLM": SMALL | {"model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, "window_size": 4,
                                  "attention_types": [[["global", "local"], 1]]},
    "OPTForCausalLM": SMALL | {"model_type": "opt", "num_hidden_layers": 2, "num_attention_heads": 4,
                               "ffn_dim": 48, "word_embed_proj_dim": 16},
    "BloomForCausalLM": {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 2,
                         "n_head": 4},
    "BertForCausalLM": SMALL | {"model_type": "bert", "num_hidden_layers": 2, "num_attention_heads": 4,
                                "intermediate_size": 48, "is_decoder": True},
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "relative_attention_num_buckets": 16, "relative_attention_max_distance": 16}  # fmt: skip
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": T5 | {"model_type": "t5", "num_decoder_layers": 3},
    "t5 v1.1": T5 | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5 | {"model_type": "mt5"},
}
IDS = jnp.array(np.random.default_rng(0).integers(3, 64, (2, 20)))


def decoder(family: str):
    """A random torch model of a family that our decoder reads; to its norms 1 is added without rounding."""
    model = random_torch_model(SHAPE | DECODERS[family] | {"model_type": family})
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.round(parameter.data * 2**12) / 2**12
    return model


def torch_logits(model, ids=IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.array(ids))).logits.float().numpy()


def assert_same_parameters(model, oracle) -> None:
    """Bit-equal to torch's state dict, in both directions."""
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    if oracle.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for path, leaf in flatten_dict(model.params).items():
        after = path.index("layers") + 1 if "layers" in path else None
        for layer in range(leaf.shape[0]) if after else (None,):
            full = path if layer is None else (*path[:after], str(layer), *path[after:])
            name = ".".join([*full[:-1], "bias" if full[-1] == "bias" else "weight"])
            value = leaf if layer is None else leaf[layer]
            np.testing.assert_array_equal(value.T if full[-1] == "kernel" else value, state.pop(name), name)
    assert not state


@pytest.mark.parametrize("family", DECODERS)
def test_safetensors_of_each_family(family, tmp_path):
    oracle = decoder(family)
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    model = load_model(tmp_path)
    assert_same_parameters(model, oracle)
    np.testing.assert_allclose(
        model(IDS).logits, torch_logits(oracle), atol=DECODER["float32"], rtol=DECODER["float32"]
    )


def test_bfloat16_safetensors_keep_their_bits(tmp_path):
    oracle = decoder("qwen3").to(torch.bfloat16)
    oracle.save_pretrained(tmp_path)
    assert_same_parameters(load_model(tmp_path), oracle.float())
    leaves = flatten_dict(load_model(tmp_path, dtype="bfloat16").params)
    head = leaves[("lm_head", "embedding")].astype(jnp.float32)
    np.testing.assert_array_equal(head, oracle.lm_head.weight.detach().numpy())


@pytest.mark.parametrize("architecture", FLAX)
def test_safetensors_of_hf_flax_families(architecture, tmp_path):
    oracle = random_torch_model(FLAX[architecture])
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    oracle.config.architectures = [architecture]  # torch names its BertForCausalLM BertLMHeadModel
    oracle.config.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model).__name__ == "Flax" + architecture
    assert as_base(model).name == str(tmp_path)
    np.testing.assert_allclose(
        model(IDS).logits, torch_logits(oracle), atol=DECODER["float32"], rtol=DECODER["float32"]
    )
    half = load_model(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BertForCausalLM"])
def test_our_attention_in_hf_flax_models_in_float64(architecture, tmp_path):
    oracle = random_torch_model(FLAX[architecture], attention="sdpa", gain=1.5)
    oracle.save_pretrained(tmp_path)
    oracle.config.architectures = [architecture]
    oracle.config.save_pretrained(tmp_path)
    oracle.double()  # eager attention would take its softmax in float32
    lengths = (12, 20)
    with jax.enable_x64(True):
        ours = as_base(load_model(tmp_path, dtype=jnp.float64))
        mask = jnp.arange(20)[None] < jnp.array(lengths)[:, None]
        logits = ours(IDS, attention_mask=mask.astype(int)).logits
    for row, ids, length in zip(logits, np.array(IDS), lengths, strict=True):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(ids[None, :length])).logits[0].numpy()
        # float64 rounding through two layers, logits of order 1 to 10.
        np.testing.assert_allclose(row[:length], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.filterwarnings("error:.*has no place for")
def test_safetensors_of_t5(name, tmp_path):
    oracle = random_torch_model(ENCODER_DECODERS[name])
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    answer, mask = IDS[:, 3:12], jnp.ones_like(IDS).at[0, 15:].set(0).at[1, :4].set(0)
    with torch.no_grad():
        given = (torch.from_numpy(np.array(array)) for array in (IDS, mask, answer))
        expected = oracle(
            **dict(zip(("input_ids", "attention_mask", "decoder_input_ids"), given, strict=True))
        )
    model = load_model(tmp_path)
    inputs = {"attention_mask": mask, "decoder_input_ids": answer}
    for call in (model, partial(as_base(model).forward, {"params": model.params})):
        np.testing.assert_allclose(
            call(IDS, **inputs).logits, expected.logits, atol=DECODER["float32"], rtol=DECODER["float32"]
        )


def test_gpt2_saved_without_its_head_as_on_the_hub(tmp_path):
    oracle = random_torch_model(FLAX["GPT2LMHeadModel"])
    oracle.transformer.save_pretrained(tmp_path)  # names without "transformer."
    oracle.config.architectures = ["GPT2LMHeadModel"]
    oracle.config.save_pretrained(tmp_path)
    expected = torch_logits(oracle)
    np.testing.assert_allclose(
        load_model(tmp_path)(IDS).logits, expected, atol=DECODER["float32"], rtol=DECODER["float32"]
    )


def test_hf_flax_weights_that_do_not_fit(tmp_path):
    oracle = random_torch_model(FLAX["GPT2LMHeadModel"])
    oracle.save_pretrained(tmp_path)
    oracle.config.n_layer = 3
    oracle.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="n_layer=3, 2 in the weights"):
        load_model(tmp_path)
    oracle.config.n_layer, oracle.config.add_cross_attention = 2, True
    oracle.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"missing \(16\): transformer\.h\.0\.crossattention\.c_attn\.bias"):
        load_model(tmp_path)
    oracle.config.n_layer, oracle.config.add_cross_attention = 1, False
    oracle.config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no place for transformer\.h\.1\.attn\.c_attn\.bias.* and 4 more"):
        load_model(tmp_path)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
# Of families with norms behind their blocks.
GGUF_NORMS = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
GGUF_KEYS = {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip


def convert_to_gguf(oracle, path: Path) -> Path:
    """What llama.cpp's convert_hf_to_gguf.py writes, its permutation of Llama's q and k included."""
    c = oracle.config
    keys = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": float(c.rope_theta),
    }  # fmt: skip
    architecture = c.model_type.removesuffix("_text")
    permutes, names = architecture in ("llama", "granite"), GGUF_NAMES
    keys["vocab_size"] = c.vocab_size
    if architecture == "llama":
        keys["rope.dimension_count"] = c.head_dim
    if architecture in ("olmo2", "gemma2", "gemma3"):
        names = GGUF_NORMS
    if architecture in ("gemma2", "gemma3"):
        keys["attention.sliding_window"] = c.sliding_window
    own = {theirs: getattr(c, ours, None) for ours, theirs in GGUF_KEYS.items()}
    keys |= {key: float(value) for key, value in own.items() if value is not None}
    tensors = {}
    if architecture == "phi3":
        head_dim, original = c.hidden_size // c.num_attention_heads, c.original_max_position_embeddings
        keys["rope.dimension_count"] = int(head_dim * c.partial_rotary_factor)
        keys["attention.sliding_window"] = c.sliding_window or 0
        keys["rope.scaling.original_context_length"] = original
        if c.rope_scaling:
            stretch = math.log(c.max_position_embeddings / original) / math.log(original)
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + stretch)
            for kind in ("long", "short"):
                factors = np.array(c.rope_scaling[f"{kind}_factor"], np.float32)
                tensors[f"rope_factors_{kind}.weight"] = factors
    elif hasattr(c, "head_dim"):
        keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    for name, tensor in oracle.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        module, suffix = name.rsplit(".", 1)
        array = tensor.numpy() + (1 if "norm" in name and "gemma" in architecture else 0)
        if module.startswith("model.layers."):
            layer, module = module.removeprefix("model.layers.").split(".", 1)
            if permutes and module.endswith(("q_proj", "k_proj")):
                heads = c.num_attention_heads if "q_proj" in module else c.num_key_value_heads
                array = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
                array = array.swapaxes(1, 2).reshape(tensor.shape)
            tensors[f"blk.{layer}.{names[module]}.{suffix}"] = np.ascontiguousarray(array)
        else:
            tensors[f"{names[module]}.{suffix}"] = array
    extra = {} if c.pad_token_id is None else {"tokenizer.ggml.padding_token_id": c.pad_token_id}
    return write_gguf(path, architecture, keys, tensors, extra=extra)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "granite", "olmo2", "gemma", "gemma2", "gemma3_text", "phi3"]
)
def test_gguf_of_each_family(family, tmp_path):
    oracle = decoder(family)
    model = load_model(convert_to_gguf(oracle, tmp_path / "m.gguf"))
    assert model.config == DecoderConfig.from_hf(oracle.config.to_dict() | {"eos_token_id": None})
    assert_same_parameters(model, oracle)
    np.testing.assert_allclose(
        model(IDS).logits, torch_logits(oracle), atol=DECODER["float32"], rtol=DECODER["float32"]
    )


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gguf_is_read_as_transformers_reads_it(family, tmp_path):
    path = convert_to_gguf(decoder(family), tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    for layer in theirs.model.layers:
        layer.self_attn.scaling = 16**-0.5  # transformers has 256 here, whatever the width of a head
    np.testing.assert_allclose(
        load_model(path)(IDS).logits,
        torch_logits(theirs.eval()),
        atol=DECODER["float32"],
        rtol=DECODER["float32"],
    )


PHI3 = SHAPE | {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 2}


def test_gguf_of_phi3_is_read_as_transformers_reads_it(tmp_path):
    """Which passes over the window, and over LongRoPE: here there is none."""
    path = convert_to_gguf(random_torch_model(PHI3 | {"sliding_window": None}), tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    np.testing.assert_allclose(
        load_model(path)(IDS).logits,
        torch_logits(theirs.eval()),
        atol=DECODER["float32"],
        rtol=DECODER["float32"],
    )


def test_gguf_of_phi3_has_longrope_and_rotates_a_part(tmp_path):
    rope = {"type": "longrope", "short_factor": [1.5, 2.5], "long_factor": [3.0, 5.0]}
    options = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 8, "rope_scaling": rope}
    oracle = random_torch_model(PHI3 | options)
    model = load_model(convert_to_gguf(oracle, tmp_path / "m.gguf"))
    names = (base_identity("m", config, [])["config_sha256"] for config in (model.config, oracle.config))
    assert len({*names}) == 1
    np.testing.assert_allclose(
        model(IDS).logits, torch_logits(oracle), atol=DECODER["float32"], rtol=DECODER["float32"]
    )


LINEAR = {"rope_type": "linear", "factor": 2.0}
# Each config of the families of our decoder that transformers' Flax class gets wrong, beside the nearest one
# that it gets right; the other families are in test_hf_flax_faults.py.
RIGHT = {
    "llama": transformers.LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=64),
    "gemma": transformers.GemmaConfig(**SHAPE, head_dim=16, hidden_act="silu", hidden_activation="silu"),
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "llama rope_theta": ({"rope_theta": 5e5}, "rope base at 10000"),
    "llama rope_scaling": ({"rope_scaling": LINEAR}, "rope_scaling"),
    "llama head_dim": ({"head_dim": 16}, "head_dim=16"),
    "llama tie_word_embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "llama mlp_bias": ({"mlp_bias": True}, "mlp_bias"),
    "mistral rope_theta": ({"rope_theta": 1e6}, "rope base at 10000"),
    "mistral sliding_window": ({"sliding_window": None}, "only itself"),
    "mistral window": ({"sliding_window": 6}, "one token too many"),
    "mistral tie_word_embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "mistral head_dim": ({"head_dim": 16}, "head_dim=16"),
    "gemma rope_theta": ({"rope_theta": 5e5}, "rope base at 10000"),
    "gemma activation": ({"hidden_act": "gelu"}, "silu instead of hidden_act=gelu"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 66}, "table of 64 positions is too narrow for heads of 66"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": None},
            "rope_theta=500",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling of type linear"),
    ],
)
def test_what_a_flax_class_cannot_rotate_is_refused_by_name(change, message):
    with pytest.raises(ModelError, match=message):
        check_hf_flax(transformers.GemmaConfig.from_dict(RIGHT["gemma"].to_dict() | change))


def hf_flax_error(config, tmp_path) -> float:
    """How far transformers' Flax logits are from its torch logits, loaded by transformers itself."""
    oracle = random_torch_model(config.to_dict(), gain=3.0)  # attention far from uniform
    oracle.save_pretrained(tmp_path)
    flax_class = getattr(transformers, "Flax" + type(oracle).__name__)
    model = flax_class.from_pretrained(tmp_path)
    return float(np.abs(model(IDS).logits - torch_logits(oracle)).max())


@pytest.mark.slow
@pytest.mark.parametrize("family", RIGHT)
def test_hf_flax_models_that_are_right_pass(family, tmp_path):
    check_hf_flax(RIGHT[family])
    # Rounding, amplified by sharp attention: up to 5e-4 was seen, on logits of order 10.
    assert hf_flax_error(RIGHT[family], tmp_path) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_hf_flax_models_that_are_wrong_are_refused_by_name(case, tmp_path):
    changes, message = WRONG[case]
    family = case.split()[0]
    config = type(RIGHT[family]).from_dict(RIGHT[family].to_dict() | changes)
    with pytest.raises(ModelError, match=message) as caught:
        check_hf_flax(config)
    assert f"Flax {family}" in str(caught.value)
    assert "hylorada_jax.load_model" in caught.value.remedy
    # They really are wrong (0.7 to 18 was seen), or the weights do not even fit.
    if "head_dim" in changes:
        with pytest.raises(ValueError, match="shape"):
            hf_flax_error(config, tmp_path)
    else:
        assert hf_flax_error(config, tmp_path) > 0.1


# Real text that comes with Python, its documentation of classes.
TEXT = pydoc_data.topics.topics["class"]


@pytest.mark.apart
def test_smollm2_has_the_parameters_and_the_logits_of_torch():
    path = find_source("smollm2-135m").path
    options = {"gguf_file": path.name, "dtype": torch.float32}
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    model = load_model("smollm2-135m")
    assert_same_parameters(model, oracle)
    ids = jnp.array([load_tokenizer("smollm2-135m").encode(TEXT)[:256]])
    expected = torch_logits(oracle, ids)
    # In the noise of float32; test_smollm2.py is the sharp one.
    assert relative_error(model(ids).logits, expected) <= MODEL["float32"]


@pytest.mark.apart
def test_smollm2_tokens_are_those_of_transformers():
    path = find_source("smollm2-135m").path
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = load_tokenizer("smollm2-135m")
    # transformers ignores `pre = smollm` (each digit a piece of its own), which shows where digits follow two
    # spaces and in non-ASCII numerals only; those are tested in tokenizer_test.py against the definition.
    texts = [TEXT, "Grüße 3.14 你好 🤦🏽‍♂️ I'll\r\n\tx  = f(a1)\n", "<|im_start|>user\nhi<|im_end|>\n"]
    for text in texts:
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.vocab_size == len(oracle)
    # transformers also swaps the two (it takes eos from bos); these are the GGUF's own numbers.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    for prompt in (True, False):
        expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == expected


@pytest.mark.apart
@needs_proc
@pytest.mark.parametrize(("dtype", "model_mb"), [("float32", 538), ("bfloat16", 269)])
def test_loading_holds_the_model_once(dtype, model_mb):
    before = """
import jax.numpy as jnp
from hylorada_jax.models.loading import load_model
jnp.zeros(1).block_until_ready()
"""
    taken = peak_memory(before, f"model = load_model('smollm2-135m', dtype='{dtype}')") / 1e6
    # The model, its largest tensor in float32 (113 MB), and 80 MB for the header and late imports.
    assert model_mb < taken < model_mb + 113 + 80
