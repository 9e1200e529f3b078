"""Llama 2 and 3; SmolLM2."""

from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.families.family import GGUF, Decoder, Family, Flax, Keys, Options, alike
from hylorada_jax.models.rope_config import RopeScaling, read_rope

GGUF_BIASES = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}


def options(keys: Keys) -> Options:
    """Biases where the config says so, and no window."""
    if keys.sliding_window is not None:
        raise ModelError(
            "A llama model has no sliding window.",
            f"sliding_window={keys.sliding_window}",
            "Set model_type to 'mistral' if the model slides, else set sliding_window to null.",
        )
    window, layers = alike(keys, None, "llama")
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        mlp_bias=keys.mlp_bias,
        sliding_window=window,
        sliding_layers=layers,
    )


def rope_faults(config: Any) -> dict[str, bool]:
    """Those of every Flax class with rotary positions."""
    theta, scaling = read_rope(config.to_dict(), config.max_position_embeddings)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = config.max_position_embeddings
    return {
        f"it fixes the rope base at 10000 and ignores rope_theta={theta:g}": theta != 10000,
        f"it ignores rope_scaling of type {scaling.rope_type}": scaling != RopeScaling(),
        f"its table of {positions} positions is too narrow for heads of {width}": positions < width,
    }


def shape_faults(config: Any) -> dict[str, bool]:
    """Those of Llama's Flax class and of its copy for Mistral."""
    width = getattr(config, "head_dim", None)
    uneven = width is not None and width * config.num_attention_heads != config.hidden_size
    tied = "it ignores tie_word_embeddings and reads the logits from a separate matrix"
    return rope_faults(config) | {
        f"it ignores head_dim={width} and splits hidden_size evenly": uneven,
        tied: config.tie_word_embeddings,
    }


def _faults(config: Any) -> dict[str, bool]:
    return shape_faults(config) | {"it ignores mlp_bias": config.mlp_bias}


FAMILIES = [
    Family(
        model_type="llama",
        tokenizer="LlamaTokenizer",
        decoder=Decoder(
            causal_lm="LlamaForCausalLM",
            keys=Keys,
            options=options,
            gguf=GGUF(
                architecture="llama",  # Mistral is that too
                biases=GGUF_BIASES,
                interleaved=True,
            ),
        ),
        flax=Flax(can=("loss",), faults=_faults),
    )
]
