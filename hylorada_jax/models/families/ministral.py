"""Ministral: Mistral, some of whose layers have a sliding window."""

from hylorada_jax.models.families.family import Decoder, Family, Options, sliding
from hylorada_jax.models.families.mistral import MistralKeys


def options(keys: MistralKeys) -> Options:
    """The window, in the layers of ``layer_types`` or else in all, and no biases."""
    window = keys.sliding_window
    window, layers = sliding(keys, window, [window is not None] * keys.num_hidden_layers)
    return Options(sliding_window=window, sliding_layers=layers)


FAMILIES = [
    Family(
        model_type="ministral",
        tokenizer="LlamaTokenizer",
        decoder=Decoder(causal_lm="MinistralForCausalLM", keys=MistralKeys, options=options),
    )
]
