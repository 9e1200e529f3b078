"""Phi-3, 3.5 and 4-mini: q, k and v in one layer, gate and up in another; a part of each head rotates."""

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from hylorada_jax.models.bounds import Epsilon, Positions, Tokens, Vocabulary, Width
from hylorada_jax.models.families.family import GGUF, Decoder, Family, Keys, Options, alike
from hylorada_jax.models.rope_config import partial_rotary_factor

_ORIGINAL = "original_max_position_embeddings"


class Phi3Keys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Phi-3."""

    vocab_size: Vocabulary = 32064
    hidden_size: Width = 3072
    intermediate_size: Width = 8192
    max_position_embeddings: Positions = 4096
    rms_norm_eps: Epsilon = 1e-5
    eos_token_id: Tokens = 32000
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] = 1.0
    resid_pdrop: Annotated[float, Meta(ge=0, le=0)] = 0.0
    embd_pdrop: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # transformers ignores it


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """The part that rotates, which transformers 5 keeps among the rope parameters, under its own key.

    The length that LongRoPE stretches is 4096 tokens where nothing says it, and not all positions, as
    elsewhere.
    """
    rope = said.get("rope_scaling") or said.get("rope_parameters")
    inner = rope.get(_ORIGINAL) if isinstance(rope, Mapping) else None
    return {_ORIGINAL: inner or 4096, **said, "partial_rotary_factor": partial_rotary_factor(said)}


def options(keys: Phi3Keys) -> Options:
    """One window for all layers, and no biases."""
    window, layers = alike(keys, keys.sliding_window, "phi3")
    return Options(
        fused=True,
        rotary_fraction=keys.partial_rotary_factor,
        sliding_window=window,
        sliding_layers=layers,
    )


FAMILIES = [
    Family(
        model_type="phi3",
        q="qkv_proj",
        k="qkv_proj",
        v="qkv_proj",
        tokenizer="LlamaTokenizer",
        decoder=Decoder(
            causal_lm="Phi3ForCausalLM",
            keys=Phi3Keys,
            options=options,
            settings=settings,
            gguf=GGUF(
                architecture="phi3",
                tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
                keys={"attention.sliding_window": "sliding_window"},
                settings=lambda said: {"sliding_window": said.get("sliding_window") or None},  # 0: none
            ),
        ),
    )
]
