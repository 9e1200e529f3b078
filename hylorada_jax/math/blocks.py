"""Rows cut into blocks of tokens, and which blocks of keys a block of queries has to visit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.relative_bias import FEW, offset_rank


class Tokens(NamedTuple):
    """What a pattern says of the queries or of the keys; cut, all leaves begin with an axis of blocks."""

    slots: Array
    positions: Array
    segments: Array | None
    valid: Array | None = None


# Of the queries, of the keys, and the window.
Sides = tuple[Tokens, Tokens, Array | int | None]


class Visits(NamedTuple):
    """Which blocks of keys each block of queries goes through, and what it finds there.

    Attributes:
        first: [query blocks] the first one.
        end: [query blocks] where it stops.
        rank: [query blocks, key blocks] the rank of the smallest offset between the two.
        few: [query blocks, key blocks] whether the offsets between them have no more than FEW buckets.
    """

    first: Array
    end: Array
    rank: Array
    few: Array


def block_size(length: int, block: int) -> int:
    """Tokens of a block, such that all of them are about equally full."""
    per_block = -(-length // -(-length // block))
    return min(block, -(-per_block // 8) * 8, length)


def cut(x: Array, axis: int, size: int, *, repeat: bool = False) -> Array:
    """Cut along an axis into a new first one; zeros, or the last entry again, fill the last block."""
    filling = (*x.shape[:axis], -x.shape[axis] % size, *x.shape[axis + 1 :])
    last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis)
    padded = jnp.concatenate([x, jnp.broadcast_to(last if repeat else jnp.zeros((), x.dtype), filling)], axis)
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def cut_pattern(pattern: Pattern, of_queries: int, of_keys: int) -> Sides:
    """The pattern of whole rows, cut into blocks.

    Args:
        pattern: its slots, positions, segments and padding are cut.
        of_queries: queries of a block.
        of_keys: keys of a block.
    """

    def tokens(size: int, slots: Array, positions: Array, segments: Array | None) -> Tokens:
        # What pads the last block repeats the last token, and so does not widen the block's ranges.
        return jax.tree.map(
            lambda x: cut(x, x.ndim - 1, size, repeat=True), Tokens(slots, positions, segments)
        )

    valid = pattern.key_valid
    if valid is None and pattern.key_positions.shape[1] % of_keys:
        valid = jnp.ones(pattern.key_positions.shape, bool)
    queries = tokens(of_queries, pattern.query_slots, pattern.query_positions, pattern.query_segments)
    keys = tokens(of_keys, pattern.key_slots, pattern.key_positions, pattern.key_segments)
    return queries, keys._replace(valid=None if valid is None else cut(valid, 1, of_keys)), pattern.window


def block_pattern(queries: Tokens, keys: Tokens, window: Array | int | None, *, causal: bool) -> Pattern:
    """The pattern of one block of queries and one of keys."""
    slots, positions = (queries.slots, keys.slots), (queries.positions, keys.positions)
    segments = queries.segments, keys.segments
    return Pattern(*slots, *positions, keys.valid, *segments, window, causal)


def find_visits(queries: Tokens, keys: Tokens, window: Array | int | None, *, causal: bool) -> Visits:
    """Worked out from the smallest and the largest number in each block, over all rows of the batch."""
    nearest, farthest = _between(_ends(queries.slots), _ends(keys.slots))
    visible = farthest >= 0 if causal else jnp.ones(farthest.shape, bool)
    if window is not None:
        visible &= nearest < window
    if keys.valid is not None:
        visible &= keys.valid.any(axis=(1, 2))
    if queries.segments is not None and keys.segments is not None:
        below, above = _between(_ends(queries.segments), _ends(keys.segments, keys.valid))
        visible &= (below <= 0) & (above >= 0)
    first = jnp.argmax(visible, axis=1)
    behind = visible.shape[1] - jnp.argmax(visible[:, ::-1], axis=1)
    lowest, highest = map(offset_rank, _between(_ends(queries.positions), _ends(keys.positions)))
    return Visits(first, jnp.where(visible.any(axis=1), behind, first), lowest, highest - lowest < FEW)


def _ends(x: Array, where: Array | None = None) -> tuple[Array, Array]:
    """The smallest and the largest number of each block; of none, such as are beyond all."""
    x, most = x.reshape(len(x), -1), jnp.iinfo(x.dtype).max
    inside = True if where is None else where.reshape(x.shape)
    return jnp.min(x, axis=1, where=inside, initial=most), jnp.max(x, axis=1, where=inside, initial=-most)


def _between(queries: tuple[Array, Array], keys: tuple[Array, Array]) -> tuple[Array, Array]:
    """The smallest and the largest difference of a query's number and a key's [query blocks, key blocks]."""
    return queries[0][:, None] - keys[1], queries[1][:, None] - keys[0]
