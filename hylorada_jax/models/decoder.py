"""Our decoder, in Flax Linen, for the families of ``models.families.DECODERS``: Llama and its relatives.

There is no dtype here: the model computes in the dtype of the parameters it is given (bfloat16, float32,
float64), and norms, angles, softmax and logits in float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.math.groups import shifted_patterns
from hylorada_jax.math.loss import logits
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.decoder_layer import Cache, Step, norm
from hylorada_jax.models.dense import Dense, scaled
from hylorada_jax.models.layer_loops import Carry, Layers, check_remat, layers_of, own_of, room_to_share, run
from hylorada_jax.models.rotation import rotary_tables
from hylorada_jax.models.stacks import stacks_of
from hylorada_jax.placement.axes import DATA, FSDP, ROWS
from hylorada_jax.placement.shards import cut


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, slot by slot, for all layers.

    Args:
        layers: of each stack of layers the keys, already rotated, and the values, both
            [layers, batch, slots, kv_heads, head_dim]; None of layers that share those of others.
        positions: [batch, slots] position ids.
        valid: [batch, slots] False for padding and for slots not yet written.
        length: scalar int32, the slots written so far; the same for every row.
    """

    layers: tuple[Cache | None, ...]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    length: Int[Array, ""]


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    config: DecoderConfig
    remat: str

    def setup(self) -> None:
        """Builds the layers as one scanned, perhaps rematerialised, layer."""
        c = self.config
        check_remat(self.remat)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size)
        if c.per_layer_width and c.per_layer_vocab:
            width = c.num_hidden_layers * c.per_layer_width
            self.embed_tokens_per_layer = nn.Embed(c.per_layer_vocab, width)
            self.per_layer_model_projection = Dense(width, use_bias=False)
            self.per_layer_projection_norm = norm(c)
        stacks = stacks_of(c)
        self.layers = Layers(c, self.remat) if len(stacks) > 1 else layers_of(stacks[0], self.remat)
        self.norm = norm(c)

    def __call__(
        self,
        input_ids: Int[Array, "batch query"],
        position_ids: Int[Array, "batch query"],
        key_valid: Bool[Array, "batch query"] | None = None,
        segment_ids: Int[Array, "batch query"] | None = None,
        cache: KVCache | None = None,
        groups: tuple[int, int] | None = None,
        counted: bool = False,
        empty: bool = False,
    ) -> tuple[Float[Array, "batch query hidden"], KVCache | None]:
        """Hidden states after the final norm; see ``DecoderLM.hidden``."""
        c, length = self.config, input_ids.shape[1]
        x = _embedded(self.embed_tokens, input_ids, c.embedding_scale, c.embedding_scale_rounded)
        start = jnp.int32(0) if cache is None else cache.length
        slots = start + jnp.arange(length, dtype=jnp.int32)
        key_slots, key_positions = slots, position_ids
        own = cache is None or empty
        if cache is not None:
            new = jnp.ones(input_ids.shape, bool) if key_valid is None else key_valid
            valid = lax.dynamic_update_slice_in_dim(cache.valid, new, start, axis=1)
            new_positions = position_ids.astype(cache.positions.dtype)
            positions = lax.dynamic_update_slice_in_dim(cache.positions, new_positions, start, axis=1)
            cache = KVCache(cache.layers, positions, valid, start + length)
            if not own:
                key_valid, key_positions = valid, positions
                key_slots = jnp.arange(valid.shape[1], dtype=jnp.int32)

        patterns: tuple[Pattern, ...]
        if groups is None:
            places = slots, key_slots, position_ids, key_positions
            facts = key_valid, segment_ids, segment_ids
            patterns = (Pattern(*places, *facts, own=own, counted=counted),)
        else:
            patterns = shifted_patterns(
                position_ids, *groups, key_valid=key_valid, segment_ids=segment_ids, counted=counted
            )

        dtype, stacks = jnp.promote_types(x.dtype, jnp.float32), stacks_of(c)
        steps = [Step(*rotary_tables(stack.config, position_ids, dtype), patterns, start) for stack in stacks]
        carry = Carry(x, None if cache is None else cache.layers, room_to_share(c, x, key_slots))
        per_layer = None if c.per_layer_width is None else self._per_layer(input_ids, x, c.per_layer_width)
        if len(stacks) == 1:  # it is the scanned layer itself, and its parameters are those of ``layers``
            carry = run(self.layers, stacks[0], carry, steps, own_of(stacks[0], per_layer))
        else:
            carry = self.layers(carry, per_layer, steps)
        if cache is not None and carry.caches is not None:
            cache = cache._replace(layers=carry.caches)
        return scaled(self.norm(carry.x), c.logit_scale), cache

    def _per_layer(
        self, input_ids: Int[Array, "batch query"], x: Float[Array, "batch query hidden"], width: int
    ) -> Float[Array, "layers batch query width"]:
        """What each layer is given of each token, (norm(projection(x)/√hidden) + √width·embedding)/√2."""
        c = self.config
        table = _embedded(self.embed_tokens_per_layer, input_ids, width**0.5, c.embedding_scale_rounded)
        projected = scaled(self.per_layer_model_projection(x), c.hidden_size**-0.5)
        shape = *input_ids.shape, c.num_hidden_layers, width
        given = self.per_layer_projection_norm(projected.reshape(shape)) + table.reshape(shape)
        return cut(jnp.moveaxis(scaled(given, 2**-0.5), 2, 0), None, ROWS)


def _embedded(
    embed: nn.Embed, ids: Int[Array, "batch query"], scale: float, rounded: bool
) -> Float[Array, "batch query width"]:
    """The rows of a table, scaled by a number, which may be rounded to their dtype before."""
    # Devices that share the table each look up their part of the width, of the rows of all of them.
    x = cut(embed(cut(ids, DATA)), DATA, None, FSDP)
    return cut(x * jnp.asarray(scale, x.dtype) if rounded else scaled(x, scale), ROWS)


class DecoderLM(nn.Module):
    """The decoder with its output embedding.

    Args:
        config: shape and options.
        remat: what the backward pass keeps of each layer: 'none' all of it; 'full' its input alone (least
            memory, one more forward pass); 'dots' the outputs of attention and of each of its linear layers,
            adapted or not, so that norms and activations are computed again, and adapters' products with A.
    """

    config: DecoderConfig
    remat: str = "none"

    def setup(self) -> None:
        """Builds the decoder, and the head where it is not tied."""
        self.model = Decoder(self.config, self.remat)
        if not self.config.tie_word_embeddings:
            # [vocab, hidden] like the embedding it replaces: the chunked loss reads slices of it as it lies.
            self.lm_head = nn.Embed(self.config.vocab_size, self.config.hidden_size)

    def hidden(
        self,
        input_ids: Int[Array, "batch query"],
        position_ids: Int[Array, "batch query"],
        key_valid: Bool[Array, "batch query"] | None = None,
        segment_ids: Int[Array, "batch query"] | None = None,
        cache: KVCache | None = None,
        groups: tuple[int, int] | None = None,
        counted: bool = False,
        empty: bool = False,
    ) -> tuple[Float[Array, "batch query hidden"], KVCache | None]:
        """Hidden states after the final norm.

        Args:
            input_ids: tokens.
            position_ids: their positions.
            key_valid: False for padding.
            segment_ids: the document of every token; not together with a cache.
            cache: the tokens so far; the new ones are appended at the end of every row.
            groups: size and shift of shifted sparse attention's groups; not together with a cache.
            counted: the positions count up by one within a document.
            empty: the cache has no tokens yet, so that the new ones attend to each other alone.

        Returns:
            The states and, when one was given, the cache with the new tokens.
        """
        return self.model(input_ids, position_ids, key_valid, segment_ids, cache, groups, counted, empty)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Logits of hidden states, in float32 at least."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return logits(hidden, head.embedding, self.config.logit_soft_cap)

    def __call__(
        self,
        input_ids: Int[Array, "batch query"],
        position_ids: Int[Array, "batch query"],
        key_valid: Bool[Array, "batch query"] | None = None,
        segment_ids: Int[Array, "batch query"] | None = None,
        groups: tuple[int, int] | None = None,
        counted: bool = False,
    ) -> Float[Array, "batch query vocab"]:
        """Logits of every token; the arguments are those of ``hidden``."""
        inputs = input_ids, position_ids, key_valid, segment_ids
        hidden, _ = self.hidden(*inputs, groups=groups, counted=counted)
        return self.logits(hidden)
