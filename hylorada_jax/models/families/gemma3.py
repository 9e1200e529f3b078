"""Gemma 3, its text part: norms of queries and keys, five layers with a window to one without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import REMEDY, RULE, Multiplier, Positions, Theta, Vocabulary
from hylorada_jax.models.families import gemma2
from hylorada_jax.models.families.family import GGUF, QK_NORMS, Decoder, Family, Options
from hylorada_jax.text import shown


class Gemma3Keys(gemma2.Gemma2Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Gemma 3."""

    vocab_size: Vocabulary = 262208
    max_position_embeddings: Positions = 131072
    sliding_window_pattern: Annotated[int, Meta(ge=1)] = 6
    rope_local_base_freq: Theta = 10000.0
    attn_logit_softcapping: None = None  # transformers does not apply it
    final_logit_softcapping: Multiplier | None = None


class _Rope(Struct):
    full_attention: dict[str, Any] | None = None
    sliding_attention: dict[str, Any] | None = None


class _Local(Struct, forbid_unknown_fields=True):
    rope_theta: Theta | None = None
    rope_type: Literal["default"] = "default"


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """With the rope parameters, which transformers 5 has for each type of layer, as 4.57 has them.

    A rope_scaling beside them is of the layers without a window, over what they say themselves.

    Raises:
        ModelError: the parameters are of no type of layer, or those of one are not a dictionary; or layers
            with a window have more than a base, which no Gemma 3 has.
    """
    where = "rope_parameters"
    rope, scaling = said.get(where), said.get("rope_scaling")
    if not rope or not isinstance(rope, Mapping):  # another type is refused by its own name
        return said
    if not set(_Rope.__struct_fields__) & rope.keys():
        raise ModelError(
            "Gemma 3 has its rope_parameters for each type of layer (transformers ignores others).",
            f"rope_parameters={shown(rope)}",
            "Write them into rope_parameters.full_attention, or remove them.",
        )
    each = checked(rope, _Rope, RULE, ModelError, REMEDY, where)
    full, local = each.full_attention or {}, each.sliding_attention or {}
    said = {key: value for key, value in said.items() if key != where}
    if isinstance(scaling, Mapping):
        full = {**full, **scaling}
        del said["rope_scaling"]
    if full:
        said[where] = full
    rule = "Layers with a window rotate by the default rope type, with a base of their own."
    remedy = "Check rope_parameters.sliding_attention in config.json."
    if theta := checked(local, _Local, rule, ModelError, remedy).rope_theta:
        said["rope_local_base_freq"] = theta
    return said


def options(keys: Gemma3Keys) -> Options:
    """Gemma 2's, norms of queries and keys, and a base of the rotary wavelengths for layers with a window."""
    return gemma2.shared(
        keys,
        every=keys.sliding_window_pattern,
        qk_norm=True,
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
            text_of=("gemma3",),
            gguf=GGUF(
                architecture="gemma3",
                tensors={**gemma2.NORMS, **QK_NORMS},
                keys={
                    "attention.sliding_window": "sliding_window",
                    "rope.freq_base_swa": "rope_local_base_freq",
                    "final_logit_softcapping": "final_logit_softcapping",
                },
                settings=lambda said: gemma2.unsaid(said, largest=62),
                norm_offset=1.0,
            ),
        ),
    )
]
