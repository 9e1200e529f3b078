"""Every family of transformers' Flax models that we take, options away from their defaults, against torch.

An option that the Flax class computes otherwise is refused by name, and shown here to be off.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("this transformers has no Flax models", allow_module_level=True)

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import DataError, ModelError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.families import FLAX
from hylorada_jax.models.hf import base, loading
from hylorada_jax.models.hf.faults import check_hf_flax
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.surgery import layout
from parity_tests.hf_weights import randomise
from parity_tests.models import random_adapters
from parity_tests.tolerances import relative_error

# Two to three layers in float32, T5's logits without a scale: up to 2e-5 was seen, and 4e-4 or more if wrong.
LOGITS = 1e-4
POSITIONS = 20
_SMALL: dict[str, Any] = {"vocab_size": 61, "max_position_embeddings": POSITIONS}
_ENCODER = _SMALL | {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
}  # fmt: skip
_PAIR = _SMALL | {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 28, "pad_token_id": 1,
    "decoder_start_token_id": 2, "scale_embedding": True, "activation_function": "relu",
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 61, "d_model": 24, "d_kv": 10, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 1,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "layer_norm_epsilon": 1e-3, "decoder_start_token_id": 0,
}  # fmt: skip
_GPT: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 20, "n_positions": POSITIONS,
    "activation_function": "relu", "layer_norm_epsilon": 1e-3,
}  # fmt: skip
_OPT = _SMALL | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 20}
# The architecture, the family and its options.
RIGHT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "gpt2", _GPT | {
        "reorder_and_upcast_attn": True, "tie_word_embeddings": False}),
    "gpt_neo": ("GPTNeoForCausalLM", "gpt_neo", _SMALL | {
        "hidden_size": 24, "num_layers": 2, "num_heads": 4, "window_size": 4, "intermediate_size": 20,
        "attention_types": [[["local", "global"], 1]], "activation_function": "silu"}),
    "gptj": ("GPTJForCausalLM", "gptj", _GPT | {"rotary_dim": 4}),
    "opt": ("OPTForCausalLM", "opt", _OPT | {"activation_function": "gelu", "tie_word_embeddings": False}),
    "opt-350m": ("OPTForCausalLM", "opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 12}),
    "bloom": ("BloomForCausalLM", "bloom", {
        "vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-3,
        "apply_residual_connection_post_layernorm": True, "pretraining_tp": 2}),
    "xglm": ("XGLMForCausalLM", "xglm", _SMALL | {
        "d_model": 24, "num_layers": 2, "attention_heads": 4, "ffn_dim": 20, "scale_embedding": False,
        "activation_function": "relu"}),
    "bert": ("BertForMaskedLM", "bert", _ENCODER | {
        "hidden_act": "quick_gelu", "type_vocab_size": 1, "layer_norm_eps": 1e-3,
        "tie_word_embeddings": False, "chunk_size_feed_forward": 4}),
    "bert, a decoder": ("BertModel", "bert", _ENCODER | {"is_decoder": True, "add_cross_attention": True}),
    "roberta": ("RobertaForMaskedLM", "roberta", _ENCODER | {
        "pad_token_id": 5, "max_position_embeddings": POSITIONS + 6, "hidden_act": "silu"}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "xlm-roberta", _ENCODER | {
        "pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}),
    "albert": ("AlbertForMaskedLM", "albert", _ENCODER | {
        "embedding_size": 12, "num_hidden_groups": 2, "hidden_act": "relu"}),
    "albert, inner": ("AlbertForMaskedLM", "albert", _ENCODER | {"embedding_size": 24, "inner_group_num": 2}),
    "distilbert": ("DistilBertForMaskedLM", "distilbert", _SMALL | {
        "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 20, "activation": "relu"}),
    "t5": ("T5ForConditionalGeneration", "t5", _T5),
    "t5 v1.1": ("T5ForConditionalGeneration", "t5", _T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", "mt5", _T5 | {"feed_forward_proj": "gated-silu"}),
    "bart": ("BartForConditionalGeneration", "bart", _PAIR | {"tie_word_embeddings": False}),
    "mbart": ("MBartForConditionalGeneration", "mbart", _PAIR),
    "pegasus": ("PegasusForConditionalGeneration", "pegasus", _PAIR),
    "marian": ("MarianMTModel", "marian", _PAIR),
    "blenderbot": ("BlenderbotForConditionalGeneration", "blenderbot", _PAIR),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", "blenderbot-small", _PAIR),
}  # fmt: skip
# What the Flax class computes otherwise or not at all, beside the nearest case that is right.
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "relative_key": ("bert", {"position_embedding_type": "relative_key"}, "type=relative_key"),
    "relative_key_query": ("bert", {"position_embedding_type": "relative_key_query"}, "relative_key_query"),
    "roberta": ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "xlm-roberta": ("xlm-roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "albert": ("albert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "gpt2 scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "gpt2 layers": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "gptj tied": ("gptj", {"tie_word_embeddings": True}, "tie its head"),
    "opt bias": ("opt", {"enable_bias": False}, "enable_bias=False"),
    "bloom slices": ("bloom", {"slow_but_exact": True}, "slow_but_exact"),
    "bloom heads": ("bloom", {"n_head": 6}, "6 heads"),
    "marian": ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
    "mish": ("bert", {"hidden_act": "mish"}, "hidden_act='mish'"),
}  # fmt: skip
# Of these, what fails in ways that users should not have to read.
LOUD = {
    "gptj tied": "ScopeParamNotFoundError", "opt bias": "weights must fit", "bloom heads": "AttributeError",
    "marian": "weights must fit", "mish": "KeyError",
}  # fmt: skip
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "electra": ("ElectraForMaskedLM", "electra", _ENCODER | {"embedding_size": 24}),
    "roformer": ("RoFormerForMaskedLM", "roformer", _ENCODER | {"embedding_size": 24, "rotary_value": True}),
}

_RNG = np.random.default_rng(0)
IDS, ANSWER = _RNG.integers(6, 61, (2, POSITIONS)), _RNG.integers(6, 61, (2, 7))
MASK = np.ones_like(IDS)
MASK[0, 15:] = 0


def saved(architecture: str, family: str, options: dict[str, Any], place: Path) -> Any:
    """A random torch model, and its files as people have them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **options)
    config._attn_implementation = "eager"  # torch's sdpa leaves out options of GPT-2's attention
    model = getattr(transformers, architecture)(config).eval()
    # Some tables of positions are constants, which Flax computes.
    constants = ["embed_positions"] if family in ("pegasus", "marian") else []
    kept = {n: p.clone() for n, p in model.named_parameters() if any(part in n for part in constants)}
    randomise(model, 1.5).load_state_dict(kept, strict=False)
    model.save_pretrained(place)
    config.architectures = [architecture]
    config.save_pretrained(place)
    return model


def error(model: Any, ours: Callable[..., Any], config: Any) -> float:
    """How far a Flax model is from its torch model, on right-padded rows as long as the context.

    Args:
        model: in torch.
        ours: (input_ids, **inputs) → the Flax model's output.
        config: of both.
    """
    ids = np.where(MASK > 0, IDS, config.pad_token_id or 0)
    inputs = {"attention_mask": MASK}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ANSWER
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), **{key: torch.from_numpy(v) for key, v in inputs.items()})
    got = ours(ids, **{key: jnp.asarray(v) for key, v in inputs.items()})
    real = np.ones_like(ANSWER, bool) if config.is_encoder_decoder else MASK > 0
    kind = "logits" if "logits" in expected else "last_hidden_state"
    return relative_error(np.asarray(got[kind])[real], expected[kind].numpy()[real])


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_taken_computes_as_torch_does_up_to_the_last_position(case, tmp_path):
    model = saved(*RIGHT[case], tmp_path)
    ours = as_base(load_model(tmp_path))
    assert base_error(model, ours) <= LOGITS
    assert ours.position_limit in (None, POSITIONS)
    if ours.position_limit:
        with pytest.raises(DataError, match="received: 21 tokens"):
            ours(np.zeros((1, POSITIONS + 1), np.int32))


# Without an output layer there is nothing that a reference's adapter could be seen in.
@pytest.mark.parametrize("case", [case for case in RIGHT if case != "bert, a decoder"])
def test_with_adapters_it_computes_as_the_reference_does(case, tmp_path):
    model = saved(*RIGHT[case], tmp_path)
    config = HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules=("all-linear",))
    ours = HyLoRADAModel(load_model(tmp_path), config)
    reference = hylorada_torch.HyLoRADAModel(model, config)
    values = random_adapters(reference, 0.1)
    reference.load_adapters({name: torch.tensor(value) for name, value in values.items()})
    adapters = layout.unflatten(
        ours.sites, {name: value.astype(np.float32) for name, value in values.items()}
    )
    assert error(reference, functools.partial(ours.apply, adapters), model.config) <= LOGITS
    assert base_error(reference, ours.base) > 3 * LOGITS


def base_error(model: Any, ours: Any) -> float:
    """The `error` of a Flax model without adapters."""
    return error(model, functools.partial(ours.forward, {"params": ours.params}), ours.config)


def test_every_family_is_tried():
    # Of these three load_model takes our own decoder, test_loading.py theirs.
    assert set(FLAX) - {"llama", "mistral", "gemma"} == {family for _, family, _ in RIGHT.values()}


@pytest.mark.parametrize("case", [*WRONG, *OTHERS])
def test_what_flax_computes_otherwise_is_refused_by_name(case, tmp_path, monkeypatch):
    if case in WRONG:
        near, change, message = WRONG[case]
        architecture, family, options = RIGHT[near]
        options = options | change
    else:
        (architecture, family, options), message = OTHERS[case], f"Flax {case} model"
    model = saved(architecture, family, options, tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=message):
        check_hf_flax(model.config)
    for module in (base, loading):
        monkeypatch.setattr(module, "check_hf_flax", lambda config: None)
    monkeypatch.setattr(loading, "check_family", lambda family: None)
    if case in LOUD:
        with pytest.raises(ModelError, match=LOUD[case]):
            base_error(model, as_base(load_model(tmp_path)))
    else:
        assert base_error(model, as_base(load_model(tmp_path))) > 3 * LOGITS


def rewrite(place: Path, **changes: Any) -> None:
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# A null beside what torch was made with: the key's default.
NULLS = {
    "gpt2": ("gpt2", {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}),
    "bert": ("bert", {"hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12}),
    "opt": ("opt", {"activation_function": "relu", "do_layer_norm_before": True}),
    "t5": ("t5", {"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6}),
}


@pytest.mark.parametrize("case", NULLS)
def test_a_null_counts_as_an_absent_key(case, tmp_path):
    near, defaults = NULLS[case]
    architecture, family, options = RIGHT[near]
    model = saved(architecture, family, options | defaults, tmp_path)
    rewrite(tmp_path, **dict.fromkeys(defaults), position_embedding_type=None, rope_parameters=None)
    assert base_error(model, as_base(load_model(tmp_path))) <= LOGITS


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_transformers_5_says_otherwise_that_t5_has_a_head_of_its_own(family, tmp_path):
    architecture, _, options = RIGHT[family]
    model = saved(architecture, family, options | {"tie_word_embeddings": False}, tmp_path)
    said = {"scale_decoder_outputs": False} if family == "t5" else {}
    rewrite(tmp_path, tie_word_embeddings=True, **said)
    assert base_error(model, as_base(load_model(tmp_path))) <= LOGITS
    if family == "t5":  # scaled, and with a head that the config calls the embedding
        rewrite(tmp_path, scale_decoder_outputs=True)
        with pytest.raises(ModelError, match=r"lm_head\.weight .* differs"):
            load_model(tmp_path)
