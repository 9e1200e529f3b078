"""gpt-oss: attention with sinks, and a mixture of experts whose tensors have all experts in one."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from hylorada_jax.models.bounds import Epsilon, Experts, Heads, Layers, Positions, Tokens, Vocabulary, Width
from hylorada_jax.models.families.family import (
    Decoder,
    Family,
    Keys,
    Mixture,
    Options,
    check_mixture,
    sliding,
)
from hylorada_jax.models.quantized_elsewhere import MXFP4


class GptOssKeys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for gpt-oss."""

    vocab_size: Vocabulary = 201088
    hidden_size: Width = 2880
    intermediate_size: Width = 2880
    num_hidden_layers: Layers = 36
    num_attention_heads: Heads = 64
    num_key_value_heads: Heads | None = 8
    head_dim: Width | None = 64
    max_position_embeddings: Positions = 131072
    hidden_act: Literal["silu"] = "silu"  # transformers does not read it, and before version 5 nor the next
    swiglu_limit: Annotated[float, Meta(ge=7, le=7)] = 7.0
    swiglu_alpha: Annotated[float, Meta(ge=1.702, le=1.702)] = 1.702
    rms_norm_eps: Epsilon = 1e-5
    eos_token_id: Tokens = None
    attention_bias: bool = True
    sliding_window: Positions | None = 128
    num_local_experts: Experts = 128
    num_experts_per_tok: Experts = 4


_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """With transformers' own stretch of the wavelengths, where the config says nothing of one.

    A null says that there is none, as transformers 4 reads it; transformers 5 stretches them then too.
    """
    speaks = any(said.get(key, {}) != {} for key in ("rope_scaling", "rope_parameters"))
    return said if speaks else {**said, "rope_scaling": _ROPE}


def options(keys: GptOssKeys) -> Options:
    """Sinks, a window in each second layer, from the first on, and the experts."""
    alternating = [number % 2 == 0 for number in range(keys.num_hidden_layers)]
    window, layers = sliding(keys, keys.sliding_window, alternating)
    mixture = Mixture(
        experts=keys.num_local_experts,
        chosen=keys.num_experts_per_tok,
        width=keys.intermediate_size,
        router="router",
        layers=("gate_up_proj", "gate_up_proj", "down_proj"),
    )
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        attention_sinks=True,
        mixture=check_mixture(mixture),
        swiglu_limit=keys.swiglu_limit,
        norm_rounded_last=True,
        sliding_window=window,
        sliding_layers=layers,
    )


FAMILIES = [
    Family(
        model_type="gpt_oss",
        mlp_output=None,
        router="mlp.router",
        tokenizer="PreTrainedTokenizerFast",
        decoder=Decoder(
            causal_lm="GptOssForCausalLM",
            keys=GptOssKeys,
            options=options,
            rope_theta=150000.0,
            settings=settings,
            quantized=(MXFP4,),
        ),
    )
]
