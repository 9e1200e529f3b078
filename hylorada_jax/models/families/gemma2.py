"""Gemma 2: norms before and behind each block, soft caps, each second layer with a window."""

from typing import Any

from hylorada_jax.models.bounds import Heads, Layers, Multiplier, Positions, Width
from hylorada_jax.models.families import gemma
from hylorada_jax.models.families.family import BEHIND, GGUF, Decoder, Family, Options, sliding


class Gemma2Keys(gemma.GemmaKeys, frozen=True, kw_only=True, rename={"hidden_act": "hidden_activation"}):
    """With transformers' defaults for Gemma 2."""

    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads | None = 4
    hidden_act: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Multiplier = 256.0
    sliding_window: Positions | None = 4096
    attn_logit_softcapping: Multiplier | None = 50.0
    final_logit_softcapping: Multiplier | None = 30.0


def options(keys: Gemma2Keys) -> Options:
    """The first layer has the window, the second has not, and so on."""
    return shared(keys, every=2)


def shared(keys: Gemma2Keys, every: int, **others: Any) -> Options:
    """What Gemma 2 and 3 have, the latter some more; of ``every`` layers, the last has no window."""
    implied = [bool((n + 1) % every) for n in range(keys.num_hidden_layers)]
    return gemma.shared(
        keys,
        *sliding(keys, keys.sliding_window, implied),
        norms="both",
        attention_scale=keys.query_pre_attn_scalar**-0.5,
        attention_soft_cap=keys.attn_logit_softcapping,
        logit_soft_cap=keys.final_logit_softcapping,
        **others,
    )


NORMS = {**BEHIND, "ffn_norm": "pre_feedforward_layernorm"}
"""llama.cpp's names of a layer's norms, and HF's."""


def unsaid(said: dict[str, Any], largest: int) -> dict[str, Any]:
    """The scale of attention, which no file has: llama.cpp knows the largest model by its depth."""
    whole = said["num_hidden_layers"] == largest
    return {
        "query_pre_attn_scalar": said["hidden_size"] / said["num_attention_heads"]
        if whole
        else said["head_dim"]
    }


FAMILIES = [
    Family(
        model_type="gemma2",
        tokenizer="GemmaTokenizer",
        decoder=Decoder(
            causal_lm="Gemma2ForCausalLM",
            keys=Gemma2Keys,
            options=options,
            gguf=GGUF(
                architecture="gemma2",
                tensors=NORMS,
                keys={
                    "attention.sliding_window": "sliding_window",
                    "attn_logit_softcapping": "attn_logit_softcapping",
                    "final_logit_softcapping": "final_logit_softcapping",
                },
                settings=lambda said: unsaid(said, largest=46),
                norm_offset=1.0,
            ),
        ),
    )
]
