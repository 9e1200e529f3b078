"""Our decoder, in Flax Linen, for the families of ``models.families.DECODERS``: Llama and its relatives.

The layers run under ``nn.scan``: their parameters, and the variables of adapters in the collection
``hylorada``, are stacked along a leading axis, and the program has the size of one layer whatever the depth,
or of the pattern in which layers of several shapes follow each other (``models.stacks``).
There is no dtype here: the model computes in the dtype of the parameters it is given (bfloat16, float32,
float64), and norms, angles, softmax and logits in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.groups import shifted_patterns
from hylorada_jax.math.loss import logits
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.decoder_layer import Cache, DecoderLayer, Step, Stream, norm, scaled
from hylorada_jax.models.rotation import rotary_tables
from hylorada_jax.models.stacks import Stack, parts_of, stacks_of
from hylorada_jax.placement.axes import DATA, FSDP, ROWS
from hylorada_jax.placement.shards import cut
from hylorada_jax.trees import COLLECTION

# What the backward pass keeps of a layer's inside. 'dots' keeps the projections (matrix products without a
# batch axis) and computes attention again, whose logits grow with the square of the length.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, slot by slot, for all layers.

    Args:
        layers: of each stack of layers the keys, already rotated, and the values, both
            [layers, batch, slots, kv_heads, head_dim].
        positions: [batch, slots] position ids.
        valid: [batch, slots] False for padding and for slots not yet written.
        length: scalar int32, the slots written so far; the same for every row.
    """

    layers: tuple[Cache, ...]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    length: Int[Array, ""]


def check_remat(remat: str) -> str:
    """The policy's name, where there is such a one; a ConfigError otherwise."""
    if remat not in REMAT_POLICIES:
        raise ConfigError(
            f"remat must be one of {', '.join(REMAT_POLICIES)}.", f"remat={remat!r}", "Choose one of them."
        )
    return remat


class Carry(NamedTuple):
    """What passes from stack to stack: the residual stream and, when decoding, each one's keys and values."""

    x: Float[Array, "batch query hidden"]
    caches: tuple[Cache, ...] | None


def scan(module: type[nn.Module], length: int) -> Callable[..., nn.Module]:
    """A module whose calls follow each other, their parameters and adapters stacked along a first axis."""
    return nn.scan(
        module,
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
    )


def layers_of(stack: Stack, remat: str, name: str | None = None) -> nn.Module:
    """The layers of a stack that follow each other as one scanned, perhaps rematerialised, layer."""
    # prevent_cse: needed outside of scan only, and it costs.
    layer = (
        DecoderLayer
        if remat == "none"
        else nn.remat(DecoderLayer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    )
    return scan(layer, stack.together)(stack.config, name=name)


def run(
    layers: nn.Module, stack: Stack, carry: Carry, steps: Sequence[Step], repeat: Int[Array, ""] | None = None
) -> Carry:
    """Applies those layers of a stack that follow each other, in one repeat of the pattern."""
    x, caches = carry
    places = jnp.arange(stack.together, dtype=jnp.int32)
    if repeat is not None:
        places += repeat * stack.together
    stream = Stream(x, None if caches is None else caches[stack.index])
    stream, _ = layers(stream, places, steps[stack.index])
    if caches is not None and stream.cache is not None:
        caches = (*caches[: stack.index], stream.cache, *caches[stack.index + 1 :])
    return Carry(stream.x, caches)


class Repeated(nn.Module):
    """The layers of one repeat of a part's pattern."""

    stacks: tuple[Stack, ...]
    remat: str

    @nn.compact
    def __call__(
        self, carry: Carry, repeat: Int[Array, ""] | None, steps: Sequence[Step]
    ) -> tuple[Carry, None]:
        """Applies them one after another."""
        for number, stack in enumerate(self.stacks):
            carry = run(layers_of(stack, self.remat, str(number)), stack, carry, steps, repeat)
        return carry, None


class Layers(nn.Module):
    """Layers of several shapes, part by part."""

    config: DecoderConfig
    remat: str

    @nn.compact
    def __call__(self, carry: Carry, steps: Sequence[Step]) -> Carry:
        """Applies all of them."""
        for number, (repeats, stacks) in enumerate(parts_of(self.config)):
            part: Any = Repeated
            if repeats > 1:
                part = _of_repeats(repeats, starting=self.is_initializing())
            repeat = None if repeats == 1 else jnp.arange(repeats, dtype=jnp.int32)
            carry, _ = part(stacks, self.remat, name=str(number))(carry, repeat, steps)
        return carry


def _of_repeats(repeats: int, *, starting: bool) -> Callable[..., nn.Module]:
    """The repeats of a pattern as one loop over it, around those over the layers of its stacks.

    Outside of it a stack has its layers along one axis, [repeats · together, …].
    """

    def reshaped(axes: tuple[int, ...], taken: int) -> Callable[[Any], Any]:
        return lambda tree: jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[taken:]), tree)

    return nn.map_variables(
        scan(Repeated, repeats),
        ("params", COLLECTION),
        trans_in_fn=reshaped((repeats, -1), 1),
        trans_out_fn=reshaped((-1,), 2),
        init=starting,
    )


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    config: DecoderConfig
    remat: str

    def setup(self) -> None:
        """Builds the layers as one scanned, perhaps rematerialised, layer."""
        c = self.config
        check_remat(self.remat)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size)
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
    ) -> tuple[Float[Array, "batch query hidden"], KVCache | None]:
        """Hidden states after the final norm; see ``DecoderLM.hidden``."""
        c, length = self.config, input_ids.shape[1]
        # Devices that share the table each look up their part of the width, of the rows of all of them.
        x = cut(self.embed_tokens(cut(input_ids, DATA)), DATA, None, FSDP)
        x = cut(scaled(x, c.embedding_scale), ROWS)
        start = jnp.int32(0) if cache is None else cache.length
        slots = start + jnp.arange(length, dtype=jnp.int32)
        key_slots, key_positions = slots, position_ids
        if cache is not None:
            new = jnp.ones(input_ids.shape, bool) if key_valid is None else key_valid
            key_valid = lax.dynamic_update_slice_in_dim(cache.valid, new, start, axis=1)
            new_positions = position_ids.astype(cache.positions.dtype)
            key_positions = lax.dynamic_update_slice_in_dim(cache.positions, new_positions, start, axis=1)
            key_slots = jnp.arange(cache.valid.shape[1], dtype=jnp.int32)

        patterns: tuple[Pattern, ...]
        if groups is None:
            places = slots, key_slots, position_ids, key_positions
            facts = key_valid, segment_ids, segment_ids
            patterns = (Pattern(*places, *facts, own=cache is None, counted=counted),)
        else:
            patterns = shifted_patterns(
                position_ids, *groups, key_valid=key_valid, segment_ids=segment_ids, counted=counted
            )

        dtype, stacks = jnp.promote_types(x.dtype, jnp.float32), stacks_of(c)
        steps = [Step(*rotary_tables(stack.config, position_ids, dtype), patterns, start) for stack in stacks]
        carry = Carry(x, None if cache is None else cache.layers)
        # One stack is the scanned layer itself, and its parameters are those of ``layers``.
        alike = len(stacks) == 1
        carry = run(self.layers, stacks[0], carry, steps) if alike else self.layers(carry, steps)
        if carry.caches is not None and key_valid is not None:
            cache = KVCache(carry.caches, key_positions, key_valid, start + length)
        return scaled(self.norm(carry.x), c.logit_scale), cache


class DecoderLM(nn.Module):
    """The decoder with its output embedding.

    Args:
        config: shape and options.
        remat: what the backward pass keeps of each layer: 'none' all of it; 'full' its input alone (least
            memory, one more forward pass); 'dots' the outputs of its linear layers, so that only attention,
            norms and activations are computed again.
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

        Returns:
            The states and, when one was given, the cache with the new tokens.
        """
        return self.model(input_ids, position_ids, key_valid, segment_ids, cache, groups, counted)

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
