"""Qwen3 with a mixture of experts in the place of its MLPs, or of some of them."""

from typing import Any

from hylorada_jax.models.bounds import Experts, Heads, Layers, Width
from hylorada_jax.models.families.family import Decoder, Family, Mixture, Options, alike, check_mixture
from hylorada_jax.models.families.qwen3 import Qwen3Keys


class Qwen3MoeKeys(Qwen3Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Qwen3-MoE."""

    hidden_size: Width = 2048
    intermediate_size: Width = 6144  # of layers without experts
    num_hidden_layers: Layers = 24
    num_key_value_heads: Heads | None = 4
    head_dim: Width | None = None
    moe_intermediate_size: Width = 768
    num_experts: Experts = 128
    num_experts_per_tok: Experts = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: Layers = 1
    mlp_only_layers: tuple[int, ...] = ()


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """With the number of experts under the key of transformers 4.57; version 5 writes another."""
    rest = {key: value for key, value in said.items() if key != "num_local_experts"}
    return {"num_experts": said["num_local_experts"], **rest} if "num_local_experts" in said else said


def options(keys: Qwen3MoeKeys) -> Options:
    """Qwen3's, one window for all layers, and the experts."""
    window, layers = alike(keys, keys.sliding_window if keys.use_sliding_window else None, "qwen3_moe")
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        mixture=experts(keys),
        dense_layers=dense(keys),
        qk_norm=True,
        sliding_window=window,
        sliding_layers=layers,
    )


def experts(keys: Any) -> Mixture:
    """The mixture of a Qwen."""
    mixture = Mixture(
        experts=keys.num_experts,
        chosen=keys.num_experts_per_tok,
        width=keys.moe_intermediate_size,
        normalised=keys.norm_topk_prob,
    )
    return check_mixture(mixture)


def dense(keys: Any) -> tuple[bool, ...]:
    """For each layer of a Qwen, whether it has an MLP and no mixture; empty: none has."""
    found = tuple(
        number in keys.mlp_only_layers or (number + 1) % keys.decoder_sparse_step > 0
        for number in range(keys.num_hidden_layers)
    )
    return found if any(found) else ()


FAMILIES = [
    Family(
        model_type="qwen3_moe",
        mlp_output=None,
        router="mlp.gate",
        tokenizer="Qwen2Tokenizer",
        decoder=Decoder(
            causal_lm="Qwen3MoeForCausalLM", keys=Qwen3MoeKeys, options=options, settings=settings
        ),
    )
]
