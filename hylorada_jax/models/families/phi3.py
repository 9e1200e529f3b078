"""Phi-3, 3.5 and 4-mini: q, k and v in one layer, gate and up in another; a part of each head rotates."""

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from hylorada_jax.models.bounds import Epsilon, Positions, Tokens, Vocabulary, Width
from hylorada_jax.models.families.family import GGUF, Decoder, Family, Keys, Options, alike
from hylorada_jax.models.rope_config import ORIGINAL, partial_rotary_factor


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
    """With LongRoPE under its later name, and the part that rotates under its own key, as 4.57 has it.

    The length that LongRoPE stretches is 4096 tokens where config.json does not say it beside the rope
    parameters: transformers passes over the one among them.
    """
    said = {ORIGINAL: 4096, **said, "partial_rotary_factor": partial_rotary_factor(said)}
    for key in ("rope_scaling", "rope_parameters"):
        rope = said.get(key)
        if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) == "yarn":
            said[key] = {**rope, "rope_type": "longrope"}
    return said


def _from_gguf(said: dict[str, Any]) -> dict[str, Any]:
    """Without a window where its length is 0; the length that LongRoPE stretches where config.json has it."""
    found: dict[str, Any] = {"sliding_window": said.get("sliding_window") or None}
    if original := (said["rope_scaling"] or {}).get(ORIGINAL):
        found[ORIGINAL] = original
    return found


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
                settings=_from_gguf,
            ),
        ),
    )
]
