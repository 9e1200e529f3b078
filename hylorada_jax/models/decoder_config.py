"""What our decoder needs to know about a model, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import FAMILIES, REMEDY, RULE, Llama
from hylorada_jax.models.rope_config import RopeScaling, read_rope

HIDDEN_ACTS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# Keys whose null is a value: Mistral without sliding_window slides over 4096 tokens, with null not at all.
_NULLS = ("num_key_value_heads", "sliding_window", "eos_token_id")

# Settings that change the computation and that this decoder does not have, with the value that means "off".
_REFUSED: dict[str, Any] = {
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_causal": True,
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape and the options of a decoder of the Llama family.

    Hashable, so that it can be a static argument of ``jax.jit``. Use ``from_hf`` to build one.

    Args:
        model_type: 'llama' (SmolLM2 too), 'mistral', 'qwen2' or 'qwen3'.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_hidden_layers: depth.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides num_attention_heads.
        head_dim: width of one head; even.
        max_position_embeddings: the context the model is made for, in tokens.
        hidden_act: the MLP's activation, by HF's name.
        rms_norm_eps: added to the mean square in every norm.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched.
        tie_word_embeddings: whether the output embedding is the input embedding.
        qkv_bias: biases in q_proj, k_proj and v_proj.
        o_bias: a bias in o_proj.
        mlp_bias: biases in gate_proj, up_proj and down_proj.
        qk_norm: a norm over each head's queries and keys.
        sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None: all of them.
        sliding_layers: for each layer, whether the window applies to it.
        initializer_range: standard deviation of random weights.
        eos_token_ids: tokens that end a text.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    initializer_range: float
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """Reads a Hugging Face config, with the defaults that transformers has for its family.

        A null counts as an absent key, except for the few keys whose null is a value. Where two keys say the
        same, as in files with the layouts of transformers 4 and 5, the one that transformers 5 takes wins.

        Args:
            hf: the content of config.json.

        Returns:
            The configuration of our decoder.

        Raises:
            ModelError: the family, or an option that changes the computation, is not one this decoder has; or
                a value is of the wrong type, out of bounds, or contradicts another.

        Example:
            >>> config = DecoderConfig.from_hf({"model_type": "llama", "num_key_value_heads": 8})
            >>> config.head_dim, config.num_key_value_heads
            (128, 8)
        """
        hf = {key: value for key, value in hf.items() if value is not None or key in _NULLS}
        family = hf.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ModelError(
                "our decoder reads the Llama family: " + ", ".join(FAMILIES),
                f"model_type={family!r}",
                "take a model of one of these families, or a model that HF has in Flax (GPT-2, OPT, …)",
            )
        for key, off in _REFUSED.items():
            if hf.get(key, off) != off:
                raise ModelError(
                    f"{key} changes the computation, and this decoder does not have it",
                    f"{key}={hf[key]!r}",
                    f"take a version of the model without it, or set {key} to {off!r} if the weights allow",
                )
        c = checked(hf, FAMILIES[family], RULE, ModelError, REMEDY)
        window, sliding = _sliding(family, c)
        theta, scaling = read_rope(hf, c.max_position_embeddings)
        eos = c.eos_token_id
        config = cls(
            model_type=family,
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads or c.num_attention_heads,
            head_dim=c.head_dim or c.hidden_size // c.num_attention_heads,
            max_position_embeddings=c.max_position_embeddings,
            hidden_act=c.hidden_act,
            rms_norm_eps=c.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=c.tie_word_embeddings,
            qkv_bias=family == "qwen2" or (c.attention_bias and family != "mistral"),
            o_bias=family in ("llama", "qwen3") and c.attention_bias,
            mlp_bias=family == "llama" and c.mlp_bias,
            qk_norm=family == "qwen3",
            sliding_window=window,
            sliding_layers=sliding,
            initializer_range=c.initializer_range,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )
        _check(config)
        return config


def _check(config: DecoderConfig) -> None:
    """Raises on shapes and names that cannot be computed."""
    c = config
    if c.num_attention_heads % c.num_key_value_heads:
        raise ModelError(
            "num_attention_heads must be a multiple of num_key_value_heads",
            f"num_attention_heads={c.num_attention_heads}, num_key_value_heads={c.num_key_value_heads}",
            "check config.json: each key-value head serves the same number of query heads",
        )
    # Dynamic NTK raises to the power of head_dim / (head_dim - 2).
    least = 4 if c.rope_scaling.rope_type == "dynamic" else 2
    if c.head_dim % 2 or c.head_dim < least:
        raise ModelError(
            f"rotary embeddings need an even head_dim of at least {least}",
            f"head_dim={c.head_dim} of hidden_size={c.hidden_size} and {c.num_attention_heads} heads",
            "check these in config.json",
        )
    if outside := [token for token in c.eos_token_ids if token >= c.vocab_size]:
        raise ModelError(
            "eos_token_id must be within the vocabulary",
            f"eos_token_id={outside[0]}, vocab_size={c.vocab_size}",
            "correct it in config.json",
        )
    if c.hidden_act not in HIDDEN_ACTS:
        raise ModelError(
            "hidden_act must be one of " + ", ".join(HIDDEN_ACTS),
            f"hidden_act={c.hidden_act!r}",
            "take a model with one of these activations",
        )


def _sliding(family: str, c: Llama) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    depth, window, types = c.num_hidden_layers, c.sliding_window, c.layer_types
    if family == "llama" and window is not None:
        raise ModelError(
            "a llama model has no sliding window",
            f"sliding_window={window}",
            "set model_type to 'mistral' if the model slides, else set sliding_window to null",
        )
    if family in ("qwen2", "qwen3"):
        window = window if c.use_sliding_window else None
        implied = [window is not None and layer >= c.max_window_layers for layer in range(depth)]
        choose = True
    else:
        implied = [window is not None] * depth
        choose = False
    if types is None:
        sliding = implied
    else:
        sliding = [kind == "sliding_attention" for kind in types]
        if len(types) != depth or (any(sliding) and window is None):
            raise ModelError(
                "layer_types names 'full_attention' or, with a window, 'sliding_attention' for each layer",
                f"layer_types of {len(types)}, {sum(sliding)} of them sliding; num_hidden_layers={depth}, "
                f"sliding_window={window}",
                "check layer_types, sliding_window and use_sliding_window in config.json",
            )
        if not choose and sliding != implied:
            raise ModelError(
                f"all layers of a {family} model attend alike (transformers ignores layer_types here)",
                f"layer_types with {sum(sliding)} of {depth} sliding, sliding_window={window}",
                "remove layer_types from config.json",
            )
    return (window if any(sliding) else None), tuple(sliding)
