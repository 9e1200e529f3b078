"""One random base model in both frameworks: transformers' torch class, and hylorada_jax reading its files."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hylorada_jax.models.loading import load_model
from parity_tests.hf_weights import make_float64

VOCAB = 31
DECODER_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
FAMILIES = {
    # Conv1D and a fused c_attn in torch, FlaxConv1D in HF's Flax model; biases everywhere.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=8,
            vocab_size=VOCAB,
            n_positions=16,
            # A frozen model runs deterministically in JAX, also in training.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    # Attends both ways, and has norms behind its residuals.
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
    # An encoder and a decoder; T5's own relative bias, no scale on its logits, norms in float32.
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            vocab_size=VOCAB,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
    # The others load into our own decoder. Llama: biases on all four projections, an untied head.
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(attention_bias=True, tie_word_embeddings=False, rope_theta=500.0, **DECODER_SIZES)
    ),
    # Biases on q, k and v alone, a tied head.
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **DECODER_SIZES)),
    # A window of 5 keys; groups of shifted attention lie across its edge.
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=5, **DECODER_SIZES)),
    # No bias, norms of queries and keys, heads wider than hidden / heads.
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=6, **DECODER_SIZES)),
}


@pytest.fixture
def base_models(tmp_path):
    """(family, dtype) → the same random model, first in torch, then in JAX."""

    def build(family, dtype):
        torch.manual_seed(0)
        model = FAMILIES[family]().to(getattr(torch, dtype)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # no bias stays 0, no norm stays 1
        model.save_pretrained(tmp_path)
        if dtype == "float64":
            make_float64(model)
        return model, load_model(tmp_path, dtype=np.dtype(dtype))

    return build
