"""One layer of our decoder.

Every linear layer but a mixture's is a plain ``nn.Dense`` with HF's name, so that adapters attach from
outside, by intercepting its call; its kernel may be quantised. Attention finds its direct adaptation in the
collection ``hylorada``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hylorada_jax.math import rope
from hylorada_jax.math.groups import attend
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.remat import computed_again
from hylorada_jax.models.daa import daa_of
from hylorada_jax.models.decoder_config import ACTIVATIONS, DecoderConfig
from hylorada_jax.models.dense import Dense, scaled
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.fused_experts import FusedExperts, FusedMixtureBlock, ScaledRouter
from hylorada_jax.models.mixture import EXPERTS, MixtureBlock, by_experts
from hylorada_jax.models.module_kinds import register
from hylorada_jax.placement.axes import ROWS
from hylorada_jax.placement.shards import cut

KeysValues = tuple[Float[Array, "batch key kv_heads head_dim"], Float[Array, "batch key kv_heads head_dim"]]


class Step(NamedTuple):
    """What the layers of a stack share in one forward pass; the window of ``patterns`` is the layer's own.

    ``cos`` and ``sin`` have a table for each rotation that layers differ in, ``rotations`` each layer's place
    among them. ``shared`` has keys and values, for layers that have none of their own.
    """

    cos: Float[Array, "rotations batch query half"]
    sin: Float[Array, "rotations batch query half"]
    rotations: Int[Array, " layers"]
    patterns: tuple[Pattern, ...]
    start: Int[Array, ""]
    shared: KeysValues | None = None


class Own(NamedTuple):
    """What a layer alone has: its number in its stack, and what it is given beside the residual stream."""

    number: Int[Array, ""]
    given: Float[Array, "batch query width"] | None


_Slots = Float[Array, "layers batch slots kv_heads head_dim"]
Cache = tuple[_Slots, _Slots]


class Stream(NamedTuple):
    """What passes from layer to layer: the residual stream and, when decoding, the stack's keys and values.

    These are carried and not scanned over, so that XLA updates them in place. Where later layers share keys
    and values, ``shared`` has those of the layer before.
    """

    x: Float[Array, "batch query hidden"]
    cache: Cache | None
    shared: KeysValues | None


def over_root_mean_square(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x / √(mean(x²) + eps) over the last axis, in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


def unweighted_norm(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """The same in x's dtype."""
    return computed_again(lambda x: over_root_mean_square(x, eps).astype(x.dtype))(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm, y = (offset + scale) · x / √(mean(x²) + eps), over the last axis.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    eps: float
    offset: float = 0.0
    rounded_last: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Norms x; the mean is taken in float32 at least."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)

        def norm(x: Array, scale: Array) -> Array:
            normed = over_root_mean_square(x, self.eps)
            if self.rounded_last:
                return ((self.offset + scale.astype(normed.dtype)) * normed).astype(x.dtype)
            return (self.offset + scale) * normed.astype(x.dtype)

        return computed_again(norm)(x, scale)


register(RMSNorm, "norm")


def norm(c: DecoderConfig, name: str | None = None) -> RMSNorm:
    """A norm of the model, by its name in the module that has it."""
    return RMSNorm(c.rms_norm_eps, c.norm_offset, c.norm_rounded_last, name=name)


def normed(c: DecoderConfig, name: str | None, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """x after the norm of a name; x itself without a name."""
    return x if name is None else norm(c, name)(x)


# HF's names of a layer's norms: before attention, after it, before the MLP, after it.
_NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class DecoderAttention(nn.Module):
    """Grouped-query self-attention with rotary positions and, with qk_norm, norms of queries and keys."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, stream: Stream, x: Float[Array, "batch query hidden"], layer: Int[Array, ""], step: Step
    ) -> tuple[Float[Array, "batch query hidden"], Stream]:
        """Attends x to itself, or to the cache in ``stream``, which comes back with x's keys and values.

        Of an empty cache the pattern's keys are x's ``own``, and are not read back from it.
        """
        c = self.config

        def heads(projected: Array, norm_name: str | None = None) -> Array:
            name = norm_name if c.qk_norm else None
            if c.qk_norm_whole:
                projected = normed(c, name, projected)
            split = projected.reshape(*x.shape[:2], -1, c.head_dim)
            return split if c.qk_norm_whole else normed(c, name, split)

        width, kv_width = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        widths = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
        if c.keys_as_values:
            del widths["v_proj"]
        if c.shared_kv_layers:
            widths = {"q_proj": width}
        q, *kv = projections(x, widths, "qkv_proj" if c.fused else None, bias=c.qkv_bias)
        cos, sin = (table[step.rotations[layer]] for table in (step.cos, step.sin))
        query = rope.apply_rope(heads(q, "q_norm"), cos, sin)
        if step.shared is None:
            key, value = rope.apply_rope(heads(kv[0], "k_norm"), cos, sin), heads(kv[-1])
            if c.value_norm:
                value = unweighted_norm(value, c.rms_norm_eps)
        else:
            key, value = step.shared

        if stream.cache is not None:
            zero = jnp.int32(0)  # 0 alone would be int64 under x64
            at = (layer, zero, step.start, zero, zero)
            keys = lax.dynamic_update_slice(stream.cache[0], key[None], at)
            values = lax.dynamic_update_slice(stream.cache[1], value[None], at)
            if not step.patterns[0].own:
                key = lax.dynamic_index_in_dim(keys, layer, keepdims=False)
                value = lax.dynamic_index_in_dim(values, layer, keepdims=False)
            stream = stream._replace(cache=(keys, values))
        if stream.shared is not None:
            stream = stream._replace(shared=(key, value))

        window = _window(c, layer)
        patterns = tuple(replace(pattern, window=window) for pattern in step.patterns)
        scale, soft_cap, sinks = c.attention_scale, c.attention_soft_cap, None
        if c.attention_sinks:
            sinks = self.param("sinks", nn.initializers.normal(), (c.num_attention_heads,), jnp.float32)
        attended = attend(
            query, key, value, patterns, daa_of(self), scale=scale, soft_cap=soft_cap, sinks=sinks
        )
        attended = attended.reshape(*x.shape[:2], -1)
        return Dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(attended), stream


register(DecoderAttention, "attention")


def _window(config: DecoderConfig, layer: Int[Array, ""]) -> int | Int[Array, ""] | None:
    """The window of a layer; of layers that slide and others that do not, chosen while they run."""
    if not config.slides:
        return None
    if all(config.sliding_layers):
        return config.sliding_window
    # No two slots are as far apart as the other number.
    slides = jnp.asarray(config.sliding_layers)[layer]
    return jnp.where(slides, jnp.int32(config.sliding_window), jnp.iinfo(jnp.int32).max)


def projections(
    x: Float[Array, "batch query hidden"], widths: Mapping[str, int], fused: str | None, *, bias: bool
) -> list[Float[Array, "batch query width"]]:
    """What linear layers of one input give, each its width by name; or one layer for all, side by side."""
    if fused is None:
        return [Dense(width, use_bias=bias, name=name)(x) for name, width in widths.items()]
    together = Dense(sum(widths.values()), use_bias=bias, name=fused)(x)
    return jnp.split(together, np.cumsum([*widths.values()])[:-1], axis=-1)


def activation(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """An activation by HF's name."""
    function, settings = ACTIVATIONS[name]
    return getattr(jax.nn, function)(x, **settings)


class MLP(nn.Module):
    """The gated feed-forward block, down(act(gate(x)) ⊙ up(x)) (SwiGLU, arXiv:2002.05202)."""

    config: DecoderConfig
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query hidden"]:
        """Applies the block."""
        c = self.config
        widths = {"gate_proj": self.width, "up_proj": self.width}
        gate, up = projections(x, widths, "gate_up_proj" if c.fused else None, bias=c.mlp_bias)
        down = Dense(c.hidden_size, use_bias=c.mlp_bias, name="down_proj")
        return down(gated(c)(gate, up))


def gated(c: DecoderConfig) -> Callable[[Array, Array], Array]:
    """(gate, up) → act(gate) ⊙ up."""
    return computed_again(lambda gate, up: activation(c.hidden_act, gate) * up)


def block(c: DecoderConfig) -> nn.Module:
    """What follows attention in a layer: one MLP, or a mixture of experts in its place."""
    if c.mixture is None or c.mixture_beside:
        return MLP(c, c.intermediate_size, name="mlp")
    if c.swiglu_limit is not None:
        return FusedMixtureBlock(c.mixture, c.swiglu_limit, name=c.mixture.name)
    shared = None if c.shared_expert is None else functools.partial(MLP, c, c.shared_expert)
    return MixtureBlock(c.mixture, gated(c), shared, name=c.mixture.name)


def with_experts(
    c: DecoderConfig, m: Mixture, x: Float[Array, "batch query hidden"], y: Float[Array, "batch query hidden"]
) -> Float[Array, "batch query hidden"]:
    """norm(y) + norm(Σ w_e · expert_e(norm(x))): what the MLP gives, y, and the mixture beside it.

    The router reads x after a norm without a weight.
    """
    logits, factor = ScaledRouter(m.experts, name=m.router)(unweighted_norm(x, c.rms_norm_eps))
    glu = lambda gate_up: gated(c)(*jnp.split(gate_up, 2, axis=-1))
    experts = FusedExperts(m, glu, name=EXPERTS)
    mixed = by_experts(m, norm(c, "pre_feedforward_layernorm_2")(x), logits, experts, factor)
    y, mixed = norm(c, "post_feedforward_layernorm_1")(y), norm(c, "post_feedforward_layernorm_2")(mixed)
    return y + mixed


class DecoderLayer(nn.Module):
    """One layer: x + s·norm(attention(norm(x))), then x + s·norm(mlp(norm(x))); the body of the scan.

    s is ``residual_scale``; which of the norms there are, ``norms`` says. With ``per_layer_width`` follows
    x + norm(projection(act(gate(x)) ⊙ given)), and with ``layer_scalar`` a number of the layer's own
    multiplies the sum.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, stream: Stream, own: Own, step: Step) -> tuple[Stream, None]:
        """Applies one layer of a stack."""
        c = self.config
        before_attention, after_attention, before_mlp, after_mlp = _NORMS[c.norms]
        x = normed(c, before_attention, stream.x)
        attended, stream = DecoderAttention(c, name="self_attn")(stream, x, own.number, step)
        x = stream.x + scaled(normed(c, after_attention, attended), c.residual_scale)
        y = block(c)(normed(c, before_mlp, x))
        if c.mixture is not None and c.mixture_beside:
            y = with_experts(c, c.mixture, x, y)
        y = normed(c, after_mlp, y)
        x = x + scaled(y, c.residual_scale)
        if own.given is not None:
            gate = Dense(own.given.shape[-1], use_bias=False, name="per_layer_input_gate")(x)
            y = Dense(c.hidden_size, use_bias=False, name="per_layer_projection")(gated(c)(gate, own.given))
            x = x + normed(c, "post_per_layer_input_norm", y)
        if c.layer_scalar:
            x = x * self.param("layer_scalar", nn.initializers.ones, (1,), jnp.float32).astype(x.dtype)
        # Rows stay where they are, so that weights are gathered, and a layer's alone.
        return stream._replace(x=cut(x, ROWS)), None
