"""Every family of models, registered once: a random torch model, and the same in JAX by way of its files."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
import torch
import transformers

from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.loading import load_model
from parity_tests.hf_weights import randomise
from parity_tests.measure import DTYPES, precision

# The models are small, and JAX computes on all cores beside: several threads of torch wait for one another
# (SmolLM2 on two busy cores: 40 seconds a step; with one thread, 2).
torch.set_num_threads(1)

VOCAB = 128  # texts are ASCII codes
_DTYPES = {name: getattr(torch, name) for name in DTYPES}  # as they are outside of `all_in_float64`
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 24, "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "beta_fast": 3.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8}  # fmt: skip
_BOTH = ["sliding_attention", "full_attention"]
_GEMMA4: dict[str, Any] = {
    **{key: value for key, value in _SIZES.items() if key not in ("rope_theta", "num_hidden_layers")},
    "head_dim": 6, "global_head_dim": 8, "num_global_key_value_heads": 3, "attention_k_eq_v": True,
    "attention_bias": True, "sliding_window": 4, "final_logit_softcapping": 2.0, "hidden_activation": "gelu",
    "use_bidirectional_attention": "vision",
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}  # fmt: skip

# Random torch models, the options of each away from their defaults. The base runs deterministically in JAX,
# also in training: no dropout.
FAMILIES: dict[str, Callable[[], Any]] = {
    # Conv1D and a fused c_attn in torch, FlaxConv1D in HF's Flax model; biases everywhere.
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=8, n_inner=12, vocab_size=VOCAB, n_positions=24,
            activation_function="gelu", layer_norm_epsilon=1e-3,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    # What follows loads into our own decoder. Llama: biases everywhere, an untied head.
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **_SIZES, head_dim=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
            rope_scaling=_LLAMA3, hidden_act="gelu_pytorch_tanh",
        )
    ),
    # Biases on q, k and v alone, a tied head, a window in one layer of two.
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **_SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4,
            max_window_layers=1, rope_scaling=_YARN,
        )
    ),
    # Norms of queries and keys, heads wider than hidden / heads.
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_SIZES, head_dim=6, attention_bias=True, tie_word_embeddings=True, use_sliding_window=True,
            sliding_window=4, layer_types=["sliding_attention", "full_attention"],
            rope_scaling={"rope_type": "linear", "factor": 3.0}, hidden_act="gelu",
        )
    ),
    # A window of 5 keys; groups of shifted attention lie across its edge.
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_SIZES, head_dim=6, sliding_window=5, rope_scaling=_YARN)
    ),
    # A window in one layer of two.
    "ministral": lambda: transformers.MinistralForCausalLM(
        transformers.MinistralConfig(
            **_SIZES, head_dim=6, sliding_window=4, rope_scaling=_YARN,
            layer_types=["full_attention", "sliding_attention"],
        )
    ),
    # Experts in the place of the MLP, of which each token has two.
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **_SIZES, head_dim=6, sliding_window=5, rope_scaling=_YARN, num_local_experts=4,
            hidden_act="gelu",
        )
    ),
    # The weights of a token's experts do not sum to 1; every other layer has an MLP.
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **_SIZES | {"num_hidden_layers": 4}, decoder_sparse_step=2, head_dim=6, attention_bias=True,
            tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, rope_scaling=_LLAMA3,
            moe_intermediate_size=10, num_experts=5, num_experts_per_tok=3,
        )
    ),
    # An expert that all tokens pass, no biases, and an MLP in the last layer.
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_SIZES, rope_scaling=_YARN, moe_intermediate_size=10, shared_expert_intermediate_size=8,
            num_experts=5, num_experts_per_tok=3, qkv_bias=False, norm_topk_prob=True, hidden_act="gelu",
            mlp_only_layers=[1],
        )
    ),
    # Sinks, and experts in one tensor that no adapter reaches; a window in the second layer.
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **_SIZES, head_dim=6, tie_word_embeddings=True, sliding_window=4, num_local_experts=5,
            num_experts_per_tok=3, layer_types=["full_attention", "sliding_attention"],
            rope_scaling=_YARN | {"truncate": False}, pad_token_id=0, eos_token_id=2,
        )
    ),
    # Fused projections, of which an adapter is one; two of a head's four dimensions rotate.
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **_SIZES, sliding_window=5, partial_rotary_factor=0.5, original_max_position_embeddings=6,
            rope_scaling={"type": "longrope", "short_factor": [1.5], "long_factor": [3.0]},
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    # A scale on embeddings, attention, residuals and logits.
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **_SIZES, attention_bias=True, mlp_bias=True, embedding_multiplier=2.5, logits_scaling=3.0,
            residual_multiplier=0.7, attention_multiplier=0.4, rope_scaling=_LLAMA3,
        )
    ),
    # Norms behind attention and MLP, and over all heads.
    "olmo2": lambda: transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(
            **_SIZES, attention_bias=True, rope_scaling={"type": "linear", "factor": 3.0},
            pad_token_id=0, eos_token_id=2,
        )
    ),
    # A layer without rotary positions, which has a window.
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(
            **_SIZES, attention_bias=True, mlp_bias=True, no_rope_layer_interval=2, use_sliding_window=True,
            sliding_window=4, rope_scaling=_YARN, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    # Scaled embeddings, norms whose weight is added to 1, heads wider than hidden / heads.
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            **_SIZES, head_dim=6, attention_bias=True, hidden_act="silu",
            rope_scaling={"rope_type": "linear", "factor": 3.0},
        )
    ),
    # The same with norms behind each block too, and soft caps that are felt; a window in the first layer.
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **_SIZES, head_dim=6, attention_bias=True, query_pre_attn_scalar=10, sliding_window=4,
            attn_logit_softcapping=0.5, final_logit_softcapping=2.0, hidden_activation="gelu",
            rope_scaling={"rope_type": "linear", "factor": 3.0},
        )
    ),
    # Norms of queries and keys in the place of the soft caps; two bases of rotary positions.
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **_SIZES, head_dim=6, attention_bias=True, query_pre_attn_scalar=10, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"], rope_local_base_freq=50.0,
            rope_scaling={"rope_type": "linear", "factor": 3.0},
        )
    ),
    # In layers without a window, heads of another size, whose values are their keys; part of these rotate.
    "gemma4_unified_text": lambda: transformers.Gemma4UnifiedForCausalLM(
        transformers.Gemma4UnifiedTextConfig(**_GEMMA4, num_hidden_layers=4, layer_types=_BOTH * 2)
    ),
    # The same, with an embedding for each layer; half of the layers have keys and values of the others, and
    # wider MLPs; and experts in one tensor stand beside the MLPs.
    "gemma4_text": lambda: transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(
            **_GEMMA4, num_hidden_layers=8, layer_types=_BOTH * 4, num_kv_shared_layers=4,
            use_double_wide_mlp=True, hidden_size_per_layer_input=5, vocab_size_per_layer_input=VOCAB + 2,
            enable_moe_block=True, num_experts=5, top_k_experts=3, moe_intermediate_size=8,
        )
    ),
    # Attends both ways, and has norms behind its residuals.
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=VOCAB, max_position_embeddings=24, hidden_act="gelu_new", layer_norm_eps=1e-3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ),
    # An encoder and a decoder; T5's own relative bias, no scale on its logits.
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=8, d_kv=6, d_ff=12, num_layers=2, num_decoder_layers=1, num_heads=2, vocab_size=VOCAB,
            relative_attention_num_buckets=8, relative_attention_max_distance=20, layer_norm_epsilon=1e-3,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip


# Those that run in Hugging Face's Flax classes, which transformers 5 has no more.
HF_FLAX = tuple(family for family in FAMILIES if family not in DECODERS)

# Those that only a later transformers has than the installed one. Not by hasattr, which imports every model.
NEW = tuple(
    family
    for family in FAMILIES
    if family not in HF_FLAX and DECODERS[family].causal_lm not in dir(transformers)
)
for _family in NEW:
    del FAMILIES[_family]


# In transformers 5 their experts are one parameter and no layers, which the reference does not adapt.
FUSED = () if hasattr(transformers, "FlaxPreTrainedModel") else ("mixtral", "qwen3_moe", "qwen2_moe")


def runs_in_jax(family: str) -> bool:
    """Whether the installed transformers has the classes that both sides of the family are made of."""
    there = family in FAMILIES and family not in FUSED
    return there and (family not in HF_FLAX or hasattr(transformers, "FlaxPreTrainedModel"))


@contextlib.contextmanager
def measuring(dtype: str) -> Iterator[None]:
    """Within it, JAX has the precision of `measure`; in float64, also in the norms of HF's T5."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(precision(dtype))
        if dtype == "float64":
            stack.enter_context(nn.intercept_methods(_t5_norm))
        yield


def _t5_norm(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    theirs, norm = next_fun(*args, **kwargs), context.module  # called, for other interceptors to see
    if type(norm).__name__ != "FlaxT5LayerNorm" or context.method_name != "__call__":
        return theirs
    return norm.weight * args[0] / jnp.sqrt(jnp.mean(args[0] ** 2, axis=-1, keepdims=True) + norm.eps)


@contextlib.contextmanager
def all_in_float64() -> Iterator[None]:
    """Within it, what transformers computes in float32 in a torch model of any dtype, it computes in float64.

    Those are norms, rotary tables and softmaxes.
    """
    with (
        _default_dtype(torch.float64),
        mock.patch.multiple(torch, float=torch.float64, float32=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def saved(family: str, dtype: str) -> tempfile.TemporaryDirectory[str]:
    """The family's random model with weights of a dtype, as transformers saves it.

    The numbers are of that dtype, the files in float64: in `all_in_float64` torch reads no others.
    """
    torch.manual_seed(0)
    with _default_dtype(_DTYPES["float32"]):  # the same numbers, whoever asks first
        model = randomise(FAMILIES[family]()).to(_DTYPES[dtype]).to(torch.float64)
    directory = tempfile.TemporaryDirectory()
    model.save_pretrained(directory.name)
    return directory


@functools.cache
def jax_base(family: str, dtype: str) -> Any:
    """The family's random model in JAX; to be called within `measuring(dtype)`."""
    return load_model(saved(family, dtype).name, dtype=jnp.dtype(dtype))


def torch_base(family: str, dtype: str) -> Any:
    """A fresh torch model of the same numbers, in float64; to be called within `all_in_float64`."""
    # transformers' own choice of attention, sdpa, leaves Gemma 2's soft cap out.
    attention = "eager" if family == "gemma2" else None
    model = FAMILIES[family]().from_pretrained(
        saved(family, dtype).name, dtype=torch.float64, attn_implementation=attention
    )
    model.eval()
    if hasattr(model, "set_experts_implementation"):  # transformers 5's own choice has no float64
        model.set_experts_implementation("eager")
    return model
