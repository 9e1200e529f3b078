"""Which keys each query sees, as facts of a few numbers per token: the mask is made where it is used."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pattern:
    """What decides which keys each query sees, and where the tokens stand; made once per forward pass.

        key k is visible to query q:  k ≤ q,  q − k < window,  key_valid[k],  segment[q] = segment[k]

    The first two go by slots, places in the row or in the KV cache: the order of the tokens decides, not
    their position ids.

    Attributes:
        query_slots: place of every query.
        key_slots: place of every key.
        query_positions: position id of every query, for a bias by distance.
        key_positions: position id of every key.
        key_valid: False for padding; None: there is none.
        query_segments: the document of every query; None: all tokens of a row are of one.
        key_segments: the document of every key.
        window: a query sees itself and the window − 1 keys before it; None: all of them. It may be traced, so
            that layers of one compiled program differ in it.
        causal: False where later keys are seen too.
        own: queries and keys are the same tokens, in order.
        counted: position ids count up by one within a segment, so that they are as far apart as the slots.
        front: None where rows are attended to whole. Otherwise rows are cut into groups as long as there are
            slots, after padding by this much in front, and "batch" counts groups.
    """

    query_slots: Int[Array, " query"]
    key_slots: Int[Array, " key"]
    query_positions: Int[Array, "batch query"]
    key_positions: Int[Array, "batch key"]
    key_valid: Bool[Array, "batch key"] | None = None
    query_segments: Int[Array, "batch query"] | None = None
    key_segments: Int[Array, "batch key"] | None = None
    window: int | Int[Array, ""] | None = None
    causal: bool = field(default=True, metadata={"static": True})
    own: bool = field(default=False, metadata={"static": True})
    counted: bool = field(default=False, metadata={"static": True})
    front: int | None = field(default=None, metadata={"static": True})

    @classmethod
    def of_rows(
        cls,
        positions: Integer[Array, "batch seq"],
        *,
        key_valid: Bool[Array, "batch seq"] | None = None,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        window: int | Int[Array, ""] | None = None,
        causal: bool = True,
        counted: bool = False,
    ) -> Pattern:
        """The pattern of rows whose tokens attend to each other.

        Args:
            positions: position id of every token.
            key_valid: False for padding.
            segment_ids: the document of every token.
            window: see the class.
            causal: see the class.
            counted: see the class.

        Example:
            >>> Pattern.of_rows(jnp.array([[0, 1, 2]]), window=2).mask()[0, 0].astype(int).tolist()
            [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        # Differences of unsigned ones would have no sign.
        positions = positions.astype(jnp.int32)
        segment_ids = None if segment_ids is None else segment_ids.astype(jnp.int32)
        slots = jnp.arange(positions.shape[1], dtype=jnp.int32)
        facts = key_valid, segment_ids, segment_ids, window, causal
        return cls(slots, slots, positions, positions, *facts, own=True, counted=counted)

    def mask(self) -> Bool[Array, "batch_or_1 1 query key"]:
        """True where the query sees the key; the batch axis is 1 where all rows are alike."""
        distance = self.query_slots[:, None] - self.key_slots[None, :]
        mask = distance >= 0 if self.causal else jnp.ones(distance.shape, bool)
        if self.window is not None:
            mask = mask & (distance < self.window)
        mask = mask[None, None]
        if self.key_valid is not None:
            mask = mask & self.key_valid[:, None, None, :]
        if self.query_segments is not None and self.key_segments is not None:
            mask = mask & (self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :])
        return mask
