"""Mistral, every layer of which can have a sliding window."""

from typing import Any

from hylorada_jax.models.bounds import Heads, Positions, Width
from hylorada_jax.models.families.family import Decoder, Family, Flax, Keys, Options, alike
from hylorada_jax.models.families.llama import shape_faults


class MistralKeys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Mistral."""

    intermediate_size: Width = 14336
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: Positions = 131072
    sliding_window: Positions | None = 4096


def options(keys: Keys) -> Options:
    """The window, and no biases."""
    window, layers = alike(keys, keys.sliding_window, "mistral")
    return Options(sliding_window=window, sliding_layers=layers)


def _faults(config: Any) -> dict[str, bool]:
    window = config.sliding_window
    narrow = window is not None and window < config.max_position_embeddings
    return shape_faults(config) | {
        "with sliding_window=None each token sees only itself": window is None,
        f"with sliding_window={window} each token sees one token too many": narrow,
    }


FAMILIES = [
    Family(
        model_type="mistral",
        tokenizer="LlamaTokenizer",
        decoder=Decoder(
            causal_lm="MistralForCausalLM", keys=MistralKeys, options=options, text_of=("mistral3",)
        ),
        flax=Flax(can=("loss",), faults=_faults),
    )
]
