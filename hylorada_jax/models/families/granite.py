"""Granite 3: Llama with a scale on embeddings, attention, residuals and logits."""

import dataclasses

from hylorada_jax.models.bounds import Multiplier
from hylorada_jax.models.families import llama
from hylorada_jax.models.families.family import GGUF, Decoder, Family, Keys, Options


class GraniteKeys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Granite."""

    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    attention_multiplier: Multiplier = 1.0
    logits_scaling: Multiplier = 1.0


def options(keys: GraniteKeys) -> Options:
    """Llama's, and the scales."""
    return dataclasses.replace(
        llama.options(keys),
        embedding_scale=keys.embedding_multiplier,
        residual_scale=keys.residual_multiplier,
        attention_scale=keys.attention_multiplier,
        logit_scale=1 / keys.logits_scaling,
    )


FAMILIES = [
    Family(
        model_type="granite",
        tokenizer="GPT2Tokenizer",
        decoder=Decoder(
            causal_lm="GraniteForCausalLM",
            keys=GraniteKeys,
            options=options,
            gguf=GGUF(
                architecture="granite",
                biases=llama.GGUF_BIASES,
                interleaved=True,
                keys={
                    "attention.scale": "attention_multiplier",
                    "embedding_scale": "embedding_multiplier",
                    "residual_scale": "residual_multiplier",
                    "logit_scale": "logits_scaling",
                },
            ),
        ),
    )
]
