"""Gemma 1, and what all of its successors share: scaled embeddings, norms whose weight is added to 1."""

import math
from typing import Any

from hylorada_jax.models.bounds import Heads, Layers, Positions, Tokens, Vocabulary, Width
from hylorada_jax.models.families.family import GGUF, Decoder, Family, Flax, Keys, Options, alike
from hylorada_jax.models.families.llama import rope_faults


class GemmaKeys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for Gemma."""

    vocab_size: Vocabulary = 256000
    hidden_size: Width = 3072
    intermediate_size: Width = 24576
    num_hidden_layers: Layers = 28
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads | None = 16
    head_dim: Width | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Positions = 8192
    eos_token_id: Tokens = 1
    tie_word_embeddings: bool = True


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """With the activation that the first files call gelu, and mean as its approximation by tanh."""
    tanh = {"hidden_act": "gelu_pytorch_tanh"}
    return {**said, **tanh} if said.get("hidden_act") == "gelu" else said


def options(keys: GemmaKeys) -> Options:
    """Without a window."""
    return shared(keys, *alike(keys, None, "gemma"))


def shared(keys: GemmaKeys, window: int | None, layers: tuple[bool, ...], **others: Any) -> Options:
    """What every Gemma has, and what it has beside."""
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        norm_offset=1.0,
        norm_rounded_last=True,
        embedding_scale=math.sqrt(keys.hidden_size),
        embedding_scale_rounded=True,
        sliding_window=window,
        sliding_layers=layers,
        **others,
    )


def _faults(config: Any) -> dict[str, bool]:
    used = config.hidden_activation or "gelu_pytorch_tanh"
    both_ways = bool(getattr(config, "use_bidirectional_attention", False))
    return rope_faults(config) | {
        f"it uses the activation {used} instead of hidden_act={config.hidden_act}": used != config.hidden_act,
        "it ignores use_bidirectional_attention": both_ways,
    }


FAMILIES = [
    Family(
        model_type="gemma",
        tokenizer="GemmaTokenizer",
        decoder=Decoder(
            causal_lm="GemmaForCausalLM",
            keys=GemmaKeys,
            options=options,
            settings=settings,
            gguf=GGUF(
                architecture="gemma",
                settings=lambda said: {"hidden_act": "gelu_pytorch_tanh"},
                norm_offset=1.0,
            ),
        ),
        flax=Flax(can=("loss",), faults=_faults, divisors=()),
    )
]
