"""Qwen 1.5 and 2 with a mixture of experts for an MLP, and beside it an expert that all tokens pass."""

from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.bounds import Experts, Heads, Layers, Width
from hylorada_jax.models.families.family import Decoder, Family, Options, alike
from hylorada_jax.models.families.qwen2 import Qwen2Keys
from hylorada_jax.models.families.qwen3_moe import dense, experts
from hylorada_jax.models.families.qwen3_moe import settings as qwen3_settings


class Qwen2MoeKeys(Qwen2Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Qwen2-MoE."""

    hidden_size: Width = 2048
    intermediate_size: Width = 5632  # of layers without experts
    num_hidden_layers: Layers = 24
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads | None = 16
    moe_intermediate_size: Width = 1408
    shared_expert_intermediate_size: Width = 5632
    num_experts: Experts = 60
    num_experts_per_tok: Experts = 4
    norm_topk_prob: bool = False
    decoder_sparse_step: Layers = 1
    mlp_only_layers: tuple[int, ...] = ()
    qkv_bias: bool = True


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """As of Qwen3-MoE; and no window is null, for which transformers 5 writes 0."""
    said = qwen3_settings(said)
    return {**said, "sliding_window": None} if said.get("sliding_window") == 0 else said


def options(keys: Qwen2MoeKeys) -> Options:
    """The experts, and the one that all tokens pass; no window."""
    if keys.use_sliding_window:
        raise ModelError(
            "A qwen2_moe model has no sliding window here (versions of transformers differ in its layers).",
            f"use_sliding_window=True, sliding_window={keys.sliding_window}",
            "Set use_sliding_window to false if the rows are no longer than the window.",
        )
    window, layers = alike(keys, None, "qwen2_moe")
    return Options(
        qkv_bias=keys.qkv_bias,
        mixture=experts(keys),
        dense_layers=dense(keys),
        shared_expert=keys.shared_expert_intermediate_size,
        sliding_window=window,
        sliding_layers=layers,
    )


FAMILIES = [
    Family(
        model_type="qwen2_moe",
        mlp_output=None,
        router="mlp.gate",
        tokenizer="Qwen2Tokenizer",
        decoder=Decoder(
            causal_lm="Qwen2MoeForCausalLM",
            keys=Qwen2MoeKeys,
            options=options,
            settings=settings,
        ),
    )
]
