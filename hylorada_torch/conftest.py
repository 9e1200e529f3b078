"""Small random models of transformers, and adapters far from their initial values."""

from collections.abc import Callable
from typing import Any

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
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

LLAMA_SIZES = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 31,
}
BERT_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 16,
}
T5_SIZES = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 31,
    "decoder_start_token_id": 0,
}
GPT2_SIZES = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "vocab_size": 31,
    "n_positions": 16,
    "attn_pdrop": 0,
    "embd_pdrop": 0,
    "resid_pdrop": 0,
}
CAUSAL_MODELS = {
    "gpt2": lambda **kw: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, **kw)),
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(attention_bias=True, **LLAMA_SIZES, **kw)),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**LLAMA_SIZES, **kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**LLAMA_SIZES, **kw)),
    "mistral": lambda **kw: MistralForCausalLM(MistralConfig(sliding_window=5, **LLAMA_SIZES, **kw)),
}
MODELS: dict[str, Callable[..., Any]] = CAUSAL_MODELS | {
    "bert": lambda **kw: BertForMaskedLM(BertConfig(**BERT_SIZES, **kw)),
    "roberta": lambda **kw: RobertaForMaskedLM(RobertaConfig(**BERT_SIZES, **kw)),
    # It has no other attention than eager.
    "t5": lambda attn_implementation: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
}
INPUT_IDS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))


def base_model(name, attn_implementation="sdpa", **settings):
    """A small random model in float64 whose biases are not zero."""
    torch.manual_seed(0)
    model = MODELS[name](attn_implementation=attn_implementation, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def randomize(parameters):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
