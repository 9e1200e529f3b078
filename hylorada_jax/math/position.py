"""Positions and distances as buckets: wide where far, and indexed alike on every device (method.md §2).

The logarithms are taken once, on the host and in float64; a device only looks the buckets up. Whatever lies
``MAX_DISTANCE`` away or farther shares the outermost bucket.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Integer, UInt

from hylorada_jax.errors import DataError
from hylorada_jax.math.explicit import looked_up

NUM_BUCKETS = 64
MAX_DISTANCE = 32768


@functools.cache
def position_buckets(num_buckets: int = NUM_BUCKETS) -> UInt[np.ndarray, " position"]:
    """The bucket of every position p = 0 … M−1, for the position bias.

        p  if p < E,  else  E + ⌊(N−E−1)·ln(max(p−E, 1)) / ln(M−E)⌋        E = N/2, M = 32768

    Args:
        num_buckets: N, 2 … M.

    Returns:
        Buckets in [0, N), never falling.

    Example:
        >>> position_buckets()[[0, 31, 33, 34, 40, 32767]].tolist()
        [0, 31, 32, 34, 38, 62]

    Source: method.md §2.
    """
    exact = num_buckets // 2
    position = np.arange(MAX_DISTANCE)
    beyond = np.log(np.maximum(position - exact, 1.0)) / np.log(MAX_DISTANCE - exact)
    far = exact + np.floor((num_buckets - exact - 1) * beyond)
    buckets = np.where(position < exact, position, np.minimum(far, num_buckets - 1))
    return buckets.astype(np.min_scalar_type(num_buckets - 1))


@functools.cache
def relative_buckets() -> UInt[np.ndarray, " offset"]:
    """The bucket of every offset q − k = −(M−1) … M−1 of a query from a key, for the attention bias.

        a  if a < X,  else  min(X + ⌊ln(a/X)/ln(M/X)·(H−X)⌋, H−1);  plus H where q − k < 0
        a = |q − k|,  H = N/2,  X = H/2

    Returns:
        Buckets in [0, N); the offset o is at index o + M − 1.

    Example:
        >>> [int(relative_buckets()[offset + MAX_DISTANCE - 1]) for offset in (0, 15, 16, 30, -1, -30)]
        [0, 15, 16, 17, 33, 49]

    Source: method.md §2; the scheme is T5's (Raffel et al. 2020, §2.1).
    """
    offset = np.arange(1 - MAX_DISTANCE, MAX_DISTANCE)
    side = NUM_BUCKETS // 2
    return (distance_buckets(offset, side) + side * (offset < 0)).astype(np.uint8)


@functools.cache
def structure_buckets(num_buckets: int = NUM_BUCKETS) -> UInt[np.ndarray, " offset"]:
    """The bucket of every offset t = −(M−1) … M−1 from the middle of the sequence, for the structure encoder.

        (N if t ≥ 0 else 0) + (a if a < X else min(X + ⌊ln(a/X + 1e-6)/ln(M/X)·(N−X)⌋, N−1))
        a = |t|,  X = N/2

    Args:
        num_buckets: N of either side, ≥ 2.

    Returns:
        Buckets in [0, 2N); the offset t is at index t + M − 1.

    Example:
        >>> [int(structure_buckets()[offset + MAX_DISTANCE - 1]) for offset in (0, 31, 1024, -1, -1024)]
        [64, 95, 112, 1, 48]

    Source: method.md §2.
    """
    offset = np.arange(1 - MAX_DISTANCE, MAX_DISTANCE)
    buckets = distance_buckets(offset, num_buckets, 1e-6) + num_buckets * (offset >= 0)
    return buckets.astype(np.min_scalar_type(2 * num_buckets))


def distance_buckets(
    offset: np.ndarray, count: int, nudge: float = 0.0, max_distance: int = MAX_DISTANCE
) -> np.ndarray:
    """The bucket of each offset's distance: one for each up to half of them, then logarithmically wider ones.

        a if a < X else min(X + ⌊ln(a/X + nudge)/ln(M/X)·(N−X)⌋, N−1),   a = |offset|,  X = N/2

    Args:
        offset: integers.
        count: N.
        nudge: added before the logarithm.
        max_distance: M, from which on all are in the last.

    Returns:
        Whole numbers in [0, N).

    Example:
        >>> distance_buckets(np.array([-3, 40, 10**6]), 32).tolist()
        [3.0, 17.0, 31.0]

    Source: Raffel et al. 2020, §2.1.
    """
    distance, exact = np.abs(offset), count // 2
    ratio = np.log(np.maximum(distance / exact, 1.0) + nudge) / np.log(max_distance / exact)
    far = exact + np.floor(ratio * (count - exact))
    return np.where(distance < exact, distance, np.minimum(far, count - 1))


def offset_buckets(
    table: UInt[np.ndarray, " offset"], offset: Int[Array, "*any"] | Float[Array, "*any"]
) -> UInt[Array, "*any"]:
    """Look offsets up in a table of the offsets −(M−1) … M−1.

    Args:
        table: :func:`relative_buckets` or :func:`structure_buckets`.
        offset: whole numbers; beyond the table they take the outermost bucket.

    Returns:
        Their buckets, in offset's shape.

    Example:
        >>> offset_buckets(relative_buckets(), jnp.array([[0, -1], [10**6, -(10**6)]])).tolist()
        [[0, 33], [31, 63]]
    """
    limit = MAX_DISTANCE - 1
    index = jnp.clip(offset, -limit, limit).astype(jnp.int32) + limit
    return looked_up(jnp.asarray(table), index)


def default_positions(
    shape: tuple[int, ...],
    *,
    attention_mask: Int[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Int[Array, "batch seq"]:
    """The position of every token when the caller gives none.

    Counted from the first token of the document with ``segment_ids``, from the first real token with
    ``attention_mask`` (padding in front is 0), else from the left.

    Args:
        shape: (batch, seq).
        attention_mask: 1 for a token, 0 for padding.
        segment_ids: the document of every token.

    Returns:
        int32 positions.

    Example:
        >>> default_positions((1, 4), attention_mask=jnp.array([[0, 1, 1, 1]])).tolist()
        [[0, 0, 1, 2]]
        >>> default_positions((1, 5), segment_ids=jnp.array([[1, 1, 2, 2, 2]])).tolist()
        [[0, 1, 0, 1, 2]]
    """
    slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is not None:
        new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        return slots - jax.lax.cummax(jnp.where(new, slots, 0), axis=1)
    if attention_mask is not None:
        return jnp.maximum(jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32) - 1, 0)
    return slots


def check_positions(positions: Array | np.ndarray, shape: tuple[int, ...] | None = None) -> None:
    """Refuse position ids that are not integers ≥ 0, one for every token.

    Args:
        positions: position ids. Values are read where they are known, outside of a compiled program.
        shape: (batch, seq) of the tokens, where the caller knows it.

    Raises:
        DataError: saying which of these.

    Example:
        >>> check_positions(jnp.array([[0, 1]]), (1, 2))
    """
    wrong = None
    if shape is not None and positions.shape != shape:
        wrong = f"shape {positions.shape} for tokens {shape}"
    elif not jnp.issubdtype(positions.dtype, jnp.integer):
        wrong = f"dtype {positions.dtype}"
    elif not isinstance(positions, jax.core.Tracer) and positions.size:
        known = np.asarray(positions)  # by numpy: what is compiled around it may be being traced
        lowest, highest = int(known.min()), int(known.max())
        if lowest < 0 or highest >= 2**31:  # they are int32 on a device
            wrong = f"a position of {lowest if lowest < 0 else highest}"
    if wrong:
        raise DataError(
            "Position ids are integers ≥ 0, below 2³¹, of shape [batch, seq].",
            wrong,
            "Count the tokens of every document from 0; give padding 0.",
        )


def position_factor(
    position_bias: Float[Array, " buckets"], positions: Integer[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """How much each position turns the update up or down, for all the adapters of a model.

        t = tanh(position_bias[bucket(position)])

    Args:
        position_bias: one learned number for each of N buckets, zeros at the start.
        positions: position ids; clamped to [0, M−1].

    Returns:
        t in (−1, 1), in position_bias's dtype.

    Example:
        >>> position_factor(jnp.zeros(64), jnp.arange(3)).tolist()
        [0.0, 0.0, 0.0]

    Source: method.md §§1–2.
    """
    index = jnp.clip(positions.astype(jnp.int32), 0, MAX_DISTANCE - 1)
    buckets = looked_up(jnp.asarray(position_buckets(len(position_bias))), index)
    return jnp.tanh(looked_up(position_bias, buckets))
