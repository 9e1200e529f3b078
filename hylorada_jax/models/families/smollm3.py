"""SmolLM3: Llama, of whose layers each fourth does without rotary positions."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from hylorada_jax.errors import ModelError
from hylorada_jax.models.bounds import Heads, Layers, Positions, Tokens, Vocabulary, Width
from hylorada_jax.models.families.family import Decoder, Family, Keys, Options, sliding


class SmolLM3Keys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for SmolLM3."""

    vocab_size: Vocabulary = 128256
    hidden_size: Width = 2048
    num_hidden_layers: Layers = 36
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads | None = 4
    max_position_embeddings: Positions = 32768
    eos_token_id: Tokens = 128001
    tie_word_embeddings: bool = True
    no_rope_layers: list[Literal[0, 1]] | None = None
    no_rope_layer_interval: Annotated[int, Meta(ge=1)] = 4


def options(keys: SmolLM3Keys) -> Options:
    """Biases where the config says so; a window in layers without rotary positions, where there is one."""
    depth, every = keys.num_hidden_layers, keys.no_rope_layer_interval
    rotates: Sequence[int] | None = keys.no_rope_layers  # 1 where a layer rotates, whatever the key is called
    if rotates is None:
        rotates = [int((n + 1) % every != 0) for n in range(depth)]
    if len(rotates) != depth:
        raise ModelError(
            "no_rope_layers has a 1 for each layer that rotates, and a 0 for each that does not.",
            f"{len(rotates)} for num_hidden_layers={depth}",
            "Check no_rope_layers in config.json.",
        )
    unrotated = tuple(not n for n in rotates)
    window = keys.sliding_window if keys.use_sliding_window else None
    window, layers = sliding(keys, window, [window is not None and bare for bare in unrotated])
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        mlp_bias=keys.mlp_bias,
        sliding_window=window,
        sliding_layers=layers,
        unrotated_layers=unrotated if any(unrotated) else (),
    )


FAMILIES = [
    Family(
        model_type="smollm3",
        tokenizer="PreTrainedTokenizerFast",
        decoder=Decoder(
            causal_lm="SmolLM3ForCausalLM", keys=SmolLM3Keys, options=options, rope_theta=2000000.0
        ),
    )
]
