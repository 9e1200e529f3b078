"""Qwen2 and 2.5: biases on q, k and v alone, and a window from some layer on."""

from hylorada_jax.models.bounds import Heads, Positions, Tokens, Vocabulary, Width
from hylorada_jax.models.families.family import GGUF, Decoder, Family, Keys, Options, sliding


class Qwen2Keys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Qwen2."""

    vocab_size: Vocabulary = 151936
    intermediate_size: Width = 22016
    num_key_value_heads: Heads | None = 32
    max_position_embeddings: Positions = 32768
    eos_token_id: Tokens = None
    sliding_window: Positions | None = 4096


def windows(keys: Keys) -> tuple[int | None, tuple[bool, ...]]:
    """The window, in the layers of ``layer_types`` or else in those after ``max_window_layers``."""
    window = keys.sliding_window if keys.use_sliding_window else None
    depth = range(keys.num_hidden_layers)
    return sliding(keys, window, [window is not None and n >= keys.max_window_layers for n in depth])


def options(keys: Keys) -> Options:
    """Biases on q, k and v, whatever the config says."""
    window, layers = windows(keys)
    return Options(qkv_bias=True, sliding_window=window, sliding_layers=layers)


FAMILIES = [
    Family(
        model_type="qwen2",
        tokenizer="Qwen2Tokenizer",
        decoder=Decoder(
            causal_lm="Qwen2ForCausalLM",
            keys=Qwen2Keys,
            options=options,
            gguf=GGUF(architecture="qwen2"),
        ),
    )
]
