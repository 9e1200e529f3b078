"""What config.json may say of a model of our decoder's families: types, bounds, defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

# Bounds are above every model there is, and low enough that shapes are traced and printed in a moment.
Vocabulary = Annotated[int, Meta(ge=1, le=2**24)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
Heads = Annotated[int, Meta(ge=1, le=2**12)]
Positions = Annotated[int, Meta(ge=1, lt=2**31)]
Epsilon = Annotated[float, Meta(gt=0, lt=1)]
Deviation = Annotated[float, Meta(ge=0, le=1e3)]
Token = Annotated[int, Meta(ge=0, lt=2**24)]
Tokens = Token | list[Token] | None

RULE = "A model's config must give each key a value of its type and within its bounds."
REMEDY = "Correct config.json, or download it again."


class Llama(Struct, frozen=True, kw_only=True):
    """The keys that our decoder reads beside those of ``rope_config``, with transformers' defaults."""

    vocab_size: Vocabulary = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    max_position_embeddings: Positions = 2048
    hidden_act: str = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: Deviation = 0.02
    eos_token_id: Tokens = 2
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Meta(ge=0)] = 28


class Mistral(Llama, frozen=True, kw_only=True):
    """Mistral's."""

    intermediate_size: Width = 14336
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: Positions = 131072
    sliding_window: Positions | None = 4096


class Qwen2(Llama, frozen=True, kw_only=True):
    """Qwen2's."""

    vocab_size: Vocabulary = 151936
    intermediate_size: Width = 22016
    num_key_value_heads: Heads | None = 32
    max_position_embeddings: Positions = 32768
    eos_token_id: Tokens = None
    sliding_window: Positions | None = 4096


class Qwen3(Qwen2, frozen=True, kw_only=True):
    """Qwen3's."""

    head_dim: Width | None = 128


FAMILIES: dict[str, type[Llama]] = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3}
