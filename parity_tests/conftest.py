"""One random base model in both frameworks: transformers' torch class, and hylorada_jax reading its files."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hylorada_jax.models.loading import load_model

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
        GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=VOCAB, n_positions=16)
    ),
    # The others load into our own decoder. Llama: biases on all four projections, an untied head.
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(attention_bias=True, tie_word_embeddings=False, rope_theta=500.0, **DECODER_SIZES)
    ),
    # Biases on q, k and v alone, a tied head.
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **DECODER_SIZES)),
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
            _widen(model)
        return model, load_model(tmp_path, dtype=np.dtype(dtype))

    return build


class _Rotary(nn.Module):
    """The default rotary table, in float64."""

    def __init__(self, head_dim, theta):
        super().__init__()
        self.frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * torch.cat([self.frequencies, self.frequencies])
        return angles.cos(), angles.sin()


def _widen(model):
    """Replace what transformers computes in float32 whatever the dtype: RMS norms and rotary tables."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            config = model.config
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            model.set_submodule(name, _Rotary(head_dim, config.rope_theta))
