"""Gemma 3, its text part: norms of queries and keys, five layers with a window to one without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from hylorada_jax.models.bounds import Heads, Layers, Multiplier, Positions, Theta, Vocabulary, Width
from hylorada_jax.models.families import gemma
from hylorada_jax.models.families.family import Decoder, Family, Options, sliding


class Gemma3Keys(gemma.GemmaKeys, frozen=True, kw_only=True, rename={"hidden_act": "hidden_activation"}):
    """With transformers' defaults for Gemma 3."""

    vocab_size: Vocabulary = 262208
    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads | None = 4
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Positions = 131072
    query_pre_attn_scalar: Multiplier = 256.0
    sliding_window: Positions | None = 4096
    sliding_window_pattern: Annotated[int, Meta(ge=1)] = 6
    rope_local_base_freq: Theta = 10000.0


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """With the rope parameters, which transformers 5 has for each type of layer, as 4.57 has them."""
    rope = said.get("rope_parameters")
    if not isinstance(rope, Mapping) or not {"full_attention", "sliding_attention"} & rope.keys():
        return said
    full, local = ({**(rope.get(f"{kind}_attention") or {})} for kind in ("full", "sliding"))
    said = {key: value for key, value in said.items() if key != "rope_parameters"}
    if full:
        said["rope_parameters"] = full
    if "rope_theta" in local:
        said["rope_local_base_freq"] = local["rope_theta"]
    return said


def options(keys: Gemma3Keys) -> Options:
    """Gemma's, a norm more behind each block, and the layers' windows."""
    every = keys.sliding_window_pattern
    implied = [bool((n + 1) % every) for n in range(keys.num_hidden_layers)]
    return gemma.shared(
        keys,
        *sliding(keys, keys.sliding_window, implied),
        qk_norm=True,
        norms="both",
        attention_scale=keys.query_pre_attn_scalar**-0.5,
        sliding_rope_theta=keys.rope_local_base_freq,
    )


FAMILIES = [
    Family(
        model_type="gemma3_text",
        tokenizer="GemmaTokenizer",
        decoder=Decoder(
            causal_lm="Gemma3ForCausalLM",
            keys=Gemma3Keys,
            options=options,
            rope_theta=1000000.0,
            settings=settings,
        ),
    )
]
