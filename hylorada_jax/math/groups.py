"""Attention in whole rows, or in groups of tokens that are shifted for half of the heads (S²-Attn)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.attention import DAA, attention, check_heads
from hylorada_jax.math.explicit import rows_folded
from hylorada_jax.math.pattern import Pattern


def shifted_patterns(
    positions: Int[Array, "batch seq"],
    group_size: int,
    shift: int,
    *,
    key_valid: Bool[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    counted: bool = False,
) -> tuple[Pattern, Pattern]:
    """The patterns of shifted sparse attention: groups of G tokens, and the same shifted, strictly causal.

        first heads:  [0, G), [G, 2G), …            last half of the heads:  [0, shift), [shift, shift + G), …

    A token sees the tokens of its group that are not later, of its own document, and no padding. Rows of any
    length: what a first or last group lacks is masked. LongLoRA rolls the tokens instead, and lets the last
    group's queries see the first tokens of the row across the wrap-around; here nothing wraps.

    Args:
        positions: position id of every token.
        group_size: G.
        shift: in tokens, 0 < shift < G.
        key_valid: False for padding.
        segment_ids: the document of every token.
        counted: as of :class:`Pattern`.

    Returns:
        The patterns of the plain and of the shifted groups, for :func:`attend`.

    Raises:
        ConfigError: the shift is not inside a group.

    Source: Chen et al. 2024 (LongLoRA), arXiv:2309.12307 §3.2.
    """
    if not 0 < shift < group_size:
        raise ConfigError(
            "Shifted groups begin inside a group: 0 < shift < group_size.",
            f"shift={shift}, group_size={group_size}",
            "Half of an even group_size is LongLoRA's choice.",
        )
    if key_valid is None:
        key_valid = jnp.ones(positions.shape, bool)

    def pattern(front: int) -> Pattern:
        groups = Pattern.of_rows(
            _to_groups(positions, group_size, front),
            key_valid=_to_groups(key_valid, group_size, front),
            segment_ids=None if segment_ids is None else _to_groups(segment_ids, group_size, front),
            counted=counted,
        )
        return replace(groups, front=front)

    return pattern(0), pattern(group_size - shift)


def attend(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    patterns: tuple[Pattern, ...],
    daa: DAA | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """:func:`attention` over the pattern of a forward pass: the one call of every self-attention layer.

    Args:
        query: queries.
        key: keys.
        value: values.
        patterns: one pattern for all heads, or two, the second for the last half of the heads
            (:func:`shifted_patterns`).
        daa: direct attention adaptation of this layer.
        scale, soft_cap, sinks, implementation: as in :func:`attention`.

    Returns:
        The attended values in query's dtype.

    Raises:
        ConfigError: a single head cannot be halved.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "implementation": implementation}
    if len(patterns) == 1:
        return _over(patterns[0], query, key, value, daa=daa, sinks=sinks, **options)
    if heads < 2:
        raise ConfigError(
            "Shifted sparse attention halves the heads of a layer.", f"{heads} head", "Use full attention."
        )
    if daa is not None:
        check_heads(daa, heads)
    outputs = []
    middle = heads - heads // 2
    for pattern, first, last in zip(patterns, (0, middle), (middle, heads), strict=True):
        # Where the cut is between two key-value heads each half takes its own; else every query head's.
        per_kv = heads // kv_heads
        shared = first % per_kv == last % per_kv == 0
        read = range(first // per_kv, last // per_kv) if shared else [h // per_kv for h in range(first, last)]
        half = jax.tree.map(lambda leaf, own=slice(first, last): _heads(leaf, own), daa)
        own = np.asarray(read)
        parts = query[:, :, first:last], key[:, :, own], value[:, :, own]
        own_sinks = None if sinks is None else sinks[first:last]
        outputs.append(_over(pattern, *parts, daa=half, sinks=own_sinks, **options))
    return jnp.concatenate(outputs, axis=2)


def _heads(leaf: Array, own: slice) -> Array:
    """What a leaf of DAA has for some of the heads."""
    return leaf if leaf.shape[-1] == 1 else leaf[..., own]


def _over(pattern: Pattern, query: Array, key: Array, value: Array, **options: Any) -> Array:
    if pattern.front is None:
        return attention(query, key, value, pattern, **options)
    size, (batch, length) = pattern.key_slots.shape[0], query.shape[:2]
    query, key, value = (_to_groups(x, size, pattern.front) for x in (query, key, value))
    attended = attention(query, key, value, pattern, **options)
    groups = -(-(pattern.front + length) // size)
    rows = rows_folded(attended, batch, groups * size, *attended.shape[2:])
    return jax.lax.slice_in_dim(rows, pattern.front, pattern.front + length, axis=1)


def _to_groups(x: Array, size: int, front: int) -> Array:
    """[batch, seq, …] → [batch · groups, size, …], zeros in front of the first and after the last token."""
    back = -(front + x.shape[1]) % size
    padded = jnp.pad(x, [(0, 0), (front, back)] + [(0, 0)] * (x.ndim - 2))
    return rows_folded(padded, len(x) * padded.shape[1] // size, size, *x.shape[2:])
