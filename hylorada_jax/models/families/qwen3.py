"""Qwen3: norms over the queries and the keys of each head."""

from hylorada_jax.models.bounds import Width
from hylorada_jax.models.families.family import GGUF, QK_NORMS, Decoder, Family, Keys, Options
from hylorada_jax.models.families.qwen2 import Qwen2Keys, windows


class Qwen3Keys(Qwen2Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Qwen3."""

    head_dim: Width | None = 128


def options(keys: Keys) -> Options:
    """Norms of queries and keys, and biases in attention where the config says so."""
    window, layers = windows(keys)
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        qk_norm=True,
        sliding_window=window,
        sliding_layers=layers,
    )


FAMILIES = [
    Family(
        model_type="qwen3",
        tokenizer="Qwen2Tokenizer",
        decoder=Decoder(
            causal_lm="Qwen3ForCausalLM",
            keys=Qwen3Keys,
            options=options,
            gguf=GGUF(
                architecture="qwen3",
                tensors=QK_NORMS,
            ),
        ),
    )
]
