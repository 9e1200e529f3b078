"""What our decoder needs to know about a model, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import REMEDY, RULE
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.families.family import Options
from hylorada_jax.models.quantized_elsewhere import BITSANDBYTES_4BIT, refuse_quantized
from hylorada_jax.models.rope_config import RopeScaling, partial_rotary_factor, read_rope

# An activation by HF's name → its name in jax.nn, and the settings there.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("silu", {}),
    "swish": ("silu", {}),
    "gelu": ("gelu", {"approximate": False}),
    "gelu_new": ("gelu", {"approximate": True}),
    "gelu_pytorch_tanh": ("gelu", {"approximate": True}),
    "relu": ("relu", {}),
}

# Keys whose null is a value: Mistral without sliding_window slides over 4096 tokens, with null not at all;
# gpt-oss without rope_scaling is stretched, with null not; Gemma 4 without per_layer_config has heads of
# another size in some layers, with null not.
_NULLS = (
    "num_key_value_heads",
    "sliding_window",
    "rope_scaling",
    "eos_token_id",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "per_layer_config",
)

# Settings that change the computation, with the value that means "off": refused where a family's keys do not
# have them.
_REFUSED: dict[str, Any] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_causal": True,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,  # with it transformers adds a loss of the router's
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Options):
    """The shape and the options of our decoder.

    Hashable, so that it can be a static argument of ``jax.jit``. Use ``from_hf`` to build one.

    Args:
        model_type: a family of ``families.DECODERS``.
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
        mixture: of experts, in the place of the MLP; None: there is one MLP.
        dense_layers: for each layer, whether it has an MLP in the place of the mixture; empty: none has.
        shared_expert: the width inside an expert that every token passes beside its own, weighed by a gate;
            None: there is none.
        mixture_beside: the mixture is not in the place of the MLP but beside it, and its layers are those of
            ``models.fused_experts``.
        swiglu_limit: the bound of gate and up in the experts of ``models.fused_experts``, which the mixture
            then has; None: each expert's layers are its own.
        attention_sinks: each query head has a logit that takes a part of every softmax and has no value.
        qk_norm: a norm over each head's queries and keys.
        fused: q_proj, k_proj and v_proj are one layer, qkv_proj, and gate_proj and up_proj are gate_up_proj.
        qk_norm_whole: that norm is over all heads together.
        value_norm: each head's values are normed too, without a weight.
        keys_as_values: layers without the window have no v_proj: their values are what k_proj gives, before
            the norm of the keys.
        full_head_dim: the width of one head in layers without the window; None: head_dim.
        full_kv_heads: the key and value heads there; None: num_key_value_heads.
        norms: whether attention and MLP have a norm before them, after them (inside the residual), or both.
        norm_offset: added to the weight of every norm.
        norm_rounded_last: a norm is rounded to the dtype of its input after its weight has multiplied it.
        layer_scalar: each layer has a number that multiplies what leaves it.
        per_layer_width: of what each layer is given of each token beside the residual stream; None: nothing.
        per_layer_vocab: rows of the embedding that has it.
        shared_kv_layers: how many layers, the last ones, have no k_proj and no v_proj: their keys and values
            are those of the last layer before them that has its own, and a window or none as they have.
        shared_kv_mlp: the width inside their MLP; None: intermediate_size.
        sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None: all of them.
        sliding_layers: for each layer, whether the window applies to it.
        rotary_fraction: the part of a head's dimensions that rotates, from the first on.
        sliding_rope_theta: the base of the wavelengths in layers with the window, which nothing stretches
            there; None: as in the others.
        unrotated_layers: for each layer, whether it does without rotary positions; empty: none does.
        embedding_scale: what the embeddings are multiplied by.
        embedding_scale_rounded: it is rounded to the embeddings' dtype before.
        residual_scale: what attention and MLP are multiplied by before they are added.
        attention_scale: of the logits of attention; None: 1/√head_dim.
        attention_soft_cap: the bound of these logits, which they approach as a tanh; None: none.
        logit_scale: what the logits of tokens are multiplied by.
        logit_soft_cap: their bound, in the same way; None: none.
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
    initializer_range: float
    eos_token_ids: tuple[int, ...]

    @property
    def rotated(self) -> int:
        """The dimensions of a head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def slides(self) -> bool:
        """Whether the window applies to a layer."""
        return any(self.sliding_layers)

    def kind(self, number: int) -> DecoderConfig:
        """The configuration of a model whose layers have the shape of this one: equal where shapes are."""
        depth, slides = self.num_hidden_layers, any(self.sliding_layers[number : number + 1])
        same: dict[str, Any] = {
            "dense_layers": (), "full_head_dim": None, "full_kv_heads": None, "shared_kv_mlp": None,
        }  # fmt: skip
        if self.dense_layers and self.dense_layers[number]:
            same |= {"mixture": None, "shared_expert": None}
        if self.shared_kv_layers:  # keys and values go from one with a window to others with it
            shared = number >= depth - self.shared_kv_layers
            same |= {"shared_kv_layers": depth if shared else 0, "sliding_layers": (slides,) * depth}
            if shared and self.shared_kv_mlp:
                same["intermediate_size"] = self.shared_kv_mlp
        if slides:
            return replace(self, **same, keys_as_values=False)
        same["head_dim"] = self.full_head_dim or self.head_dim
        same["num_key_value_heads"] = self.full_kv_heads or self.num_key_value_heads
        return replace(self, **same)

    def kinds(self) -> tuple[DecoderConfig, ...]:
        """What :meth:`kind` gives for the layers, each once, in the order of the layers."""
        return tuple(dict.fromkeys(self.kind(number) for number in range(self.num_hidden_layers)))

    @property
    def kv_heads_in_common(self) -> int:
        """The largest number that divides every layer's key and value heads."""
        return math.gcd(*(kind.num_key_value_heads for kind in self.kinds()))

    def of_layers(self, numbers: Sequence[int]) -> DecoderConfig:
        """The configuration of a model of these layers alone, which are of one shape."""

        def own(whole: tuple[bool, ...]) -> tuple[bool, ...]:
            return tuple(whole[number] for number in numbers) if whole else ()

        return replace(
            self.kind(numbers[0]),
            num_hidden_layers=len(numbers),
            sliding_layers=own(self.sliding_layers),
            unrotated_layers=own(self.unrotated_layers),
        )

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
        if not isinstance(family, str) or family not in DECODERS:
            raise ModelError(
                f"Our decoder reads the families {', '.join(DECODERS)}.",
                f"model_type={family!r}",
                "Take a model of one of these families; load_model takes others from HF's Flax classes.",
            )
        decoder = DECODERS[family]
        refuse_quantized(hf, (BITSANDBYTES_4BIT, *decoder.quantized))
        hf = decoder.settings(hf)
        for key, off in _REFUSED.items():
            if key not in decoder.keys.__struct_fields__ and hf.get(key, off) != off:
                raise ModelError(
                    f"{key} changes the computation, and this decoder does not have it.",
                    f"{key}={hf[key]!r}",
                    f"Take a version of the model without it, or set {key} to {off!r} if the weights allow.",
                )
        c = checked(hf, decoder.keys, RULE, ModelError, REMEDY)
        options = decoder.options(c)
        theta, scaling = read_rope(hf, c.max_position_embeddings, decoder.rope_theta)
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
            initializer_range=c.initializer_range,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            **vars(options),
        )
        for kind in config.kinds():
            _check(kind, partial_rotary_factor(hf))
        return config


def _check(config: DecoderConfig, rotary_fraction: Any) -> None:
    """Raises on shapes and names that cannot be computed."""
    c = config
    if c.rotary_fraction != rotary_fraction:
        raise ModelError(
            f"A {c.model_type} model of this decoder rotates whole heads.",
            f"partial_rotary_factor={rotary_fraction!r}",
            "Take a version of the model without it.",
        )
    if c.num_attention_heads % c.num_key_value_heads:
        raise ModelError(
            "num_attention_heads must be a multiple of num_key_value_heads.",
            f"num_attention_heads={c.num_attention_heads}, num_key_value_heads={c.num_key_value_heads}",
            "Check config.json: each key-value head serves the same number of query heads.",
        )
    # Dynamic NTK raises to the power of head_dim / (head_dim - 2).
    least, rope = (4 if c.rope_scaling.rope_type == "dynamic" else 2), c.rope_scaling
    if c.rotated % 2 or c.rotated < least:
        raise ModelError(
            f"Rotary embeddings need an even head_dim of at least {least}.",
            f"{c.rotated} of head_dim={c.head_dim} of hidden_size={c.hidden_size} and "
            f"{c.num_attention_heads} heads",
            "Check these in config.json.",
        )
    lengths = {len(rope.short_factors), len(rope.long_factors)}
    if rope.rope_type == "longrope" and lengths != {c.rotated // 2}:
        raise ModelError(
            "LongRoPE has a factor for each pair of dimensions that rotate.",
            f"{len(rope.short_factors)} and {len(rope.long_factors)} factors for {c.rotated} dimensions",
            "Check short_factor and long_factor in config.json.",
        )
    if outside := [token for token in c.eos_token_ids if token >= c.vocab_size]:
        raise ModelError(
            "eos_token_id must be within the vocabulary.",
            f"eos_token_id={outside[0]}, vocab_size={c.vocab_size}",
            "Correct it in config.json.",
        )
    if c.hidden_act not in ACTIVATIONS:
        raise ModelError(
            f"hidden_act must be one of {', '.join(ACTIVATIONS)}.",
            f"hidden_act={c.hidden_act!r}",
            "Take a model with one of these activations.",
        )
