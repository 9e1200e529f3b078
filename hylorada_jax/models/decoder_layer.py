"""One layer of our decoder.

Every linear layer is a plain ``nn.Dense`` with HF's name, so that adapters attach from outside, by
intercepting its call. Attention finds its direct adaptation in the collection ``hylorada``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hylorada_jax.math import rope
from hylorada_jax.math.groups import attend
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.models.daa import daa_of
from hylorada_jax.models.decoder_config import ACTIVATIONS, DecoderConfig
from hylorada_jax.models.module_kinds import register


class Step(NamedTuple):
    """What all layers share in one forward pass; the window of ``patterns`` is the layer's own."""

    cos: Float[Array, "batch query half"]
    sin: Float[Array, "batch query half"]
    patterns: tuple[Pattern, ...]
    start: Int[Array, ""]


_Cache = Float[Array, "layers batch slots kv_heads head_dim"]


class Stream(NamedTuple):
    """What passes from layer to layer: the residual stream and, when decoding, all layers' keys and values.

    These are carried and not scanned over, so that XLA updates them in place.
    """

    x: Float[Array, "batch query hidden"]
    cache: tuple[_Cache, _Cache] | None


class RMSNorm(nn.Module):
    """Root-mean-square norm, y = scale · x / √(mean(x²) + eps), over the last axis (arXiv:1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Norms x; the mean is taken in float32 at least."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return scale * normed.astype(x.dtype)


register(RMSNorm, "norm")


class DecoderAttention(nn.Module):
    """Grouped-query self-attention with rotary positions and, with qk_norm, norms over queries and keys."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, stream: Stream, x: Float[Array, "batch query hidden"], layer: Int[Array, ""], step: Step
    ) -> tuple[Float[Array, "batch query hidden"], Stream]:
        """Attends x to itself, or to the cache in ``stream``, which comes back with x's keys and values."""
        c = self.config

        def heads(name: str, count: int) -> Float[Array, "batch query heads head_dim"]:
            projected = nn.Dense(count * c.head_dim, use_bias=c.qkv_bias, name=name)(x)
            return projected.reshape(*x.shape[:2], count, c.head_dim)

        query = heads("q_proj", c.num_attention_heads)
        key = heads("k_proj", c.num_key_value_heads)
        value = heads("v_proj", c.num_key_value_heads)
        if c.qk_norm:
            query = RMSNorm(c.rms_norm_eps, name="q_norm")(query)
            key = RMSNorm(c.rms_norm_eps, name="k_norm")(key)
        query = rope.apply_rope(query, step.cos, step.sin)
        key = rope.apply_rope(key, step.cos, step.sin)

        if stream.cache is not None:
            at = (layer, 0, step.start, 0, 0)
            keys = lax.dynamic_update_slice(stream.cache[0], key[None], at)
            values = lax.dynamic_update_slice(stream.cache[1], value[None], at)
            key = lax.dynamic_index_in_dim(keys, layer, keepdims=False)
            value = lax.dynamic_index_in_dim(values, layer, keepdims=False)
            stream = stream._replace(cache=(keys, values))

        window = _window(c, layer)
        patterns = tuple(replace(pattern, window=window) for pattern in step.patterns)
        attended = attend(query, key, value, patterns, daa_of(self)).reshape(*x.shape[:2], -1)
        return nn.Dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(attended), stream


register(DecoderAttention, "attention")


def _window(config: DecoderConfig, layer: Int[Array, ""]) -> int | Int[Array, ""] | None:
    """The window of a layer; of layers that slide and others that do not, chosen while they run."""
    if not any(config.sliding_layers):
        return None
    if all(config.sliding_layers):
        return config.sliding_window
    # No two slots are as far apart as the other number.
    slides = jnp.asarray(config.sliding_layers)[layer]
    return jnp.where(slides, jnp.int32(config.sliding_window), jnp.iinfo(jnp.int32).max)


def activation(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """An activation by HF's name."""
    function, settings = ACTIVATIONS[name]
    return getattr(jax.nn, function)(x, **settings)


class MLP(nn.Module):
    """The gated feed-forward block, down(act(gate(x)) ⊙ up(x)) (SwiGLU, arXiv:2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query hidden"]:
        """Applies the block."""
        c = self.config
        gate = nn.Dense(c.intermediate_size, use_bias=c.mlp_bias, name="gate_proj")(x)
        up = nn.Dense(c.intermediate_size, use_bias=c.mlp_bias, name="up_proj")(x)
        down = nn.Dense(c.hidden_size, use_bias=c.mlp_bias, name="down_proj")
        return down(activation(c.hidden_act, gate) * up)


class DecoderLayer(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); the body of the scan."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, stream: Stream, layer: Int[Array, ""], step: Step) -> tuple[Stream, None]:
        """Applies layer number ``layer``."""
        c = self.config
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(stream.x)
        attended, stream = DecoderAttention(c, name="self_attn")(stream, normed, layer, step)
        x = stream.x + attended
        x = x + MLP(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))
        return stream._replace(x=x), None
