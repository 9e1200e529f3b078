"""From rows to batches: a shuffled, repeating iterator whose place can be saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grain
import numpy as np

from hylorada_jax.data.packing import Rows
from hylorada_jax.models.batch import KEYS, Batch

Shares = Sequence[tuple[Rows | Sequence[Batch], float]]
"""The rows of each source, and its weight."""

_ENDLESS = 2**50  # rows; more than anybody trains on


def shuffled_batches(
    rows: Rows | Sequence[Batch], batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Batches without end: every epoch has each row once, in an order of its own.

    Args:
        rows: what to draw from.
        batch_size: rows per batch; a batch may reach over the end of an epoch.
        seed: of the order.

    Returns:
        An iterator with ``get_state`` and ``set_state``; a batch also has ``row``, the rows' numbers [batch].
    """
    return mixed_batches([(rows, 1)], batch_size, seed)


def mixed_batches(shares: Shares, batch_size: int, seed: int) -> grain.DatasetIterator[Batch]:
    """Batches without end of the rows of several sources, as :class:`hylorada_jax.data.mixture.Mixture` says.

    Args:
        shares: what to draw from.
        batch_size: rows per batch.
        seed: of the order.

    Returns:
        As :func:`shuffled_batches`; the rows of a source are numbered behind those of the ones before it.
    """
    sources, first = [], 0
    for number, (rows, _) in enumerate(shares):
        # Not repeat() without a number: grain then divides the largest int by the batch size in floating
        # point, which overflows for a batch of one.
        epochs = _ENDLESS // len(rows) + 1
        order = grain.MapDataset.range(len(rows)).shuffle(seed=(seed + number) % 2**32)
        sources.append(order.map(_numbered(rows, first)).repeat(epochs))
        first += len(rows)
    dataset = grain.MapDataset.mix(sources, [weight for _, weight in shares]).batch(batch_size)
    # Making a row takes microseconds: threads would cost more than they save.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def rows_of_epoch(shares: Shares) -> int:
    """The rows that are drawn until the first source is used up; of one source, all."""
    sources = [grain.MapDataset.range(len(rows)) for rows, _ in shares]
    return len(grain.MapDataset.mix(sources, [weight for _, weight in shares]))


def _numbered(rows: Rows | Sequence[Batch], first: int) -> Callable[[int], Batch]:
    """Gives a row by its index, with its number among those of all sources."""
    dtype = KEYS["row"].dtype
    return lambda index: {**rows[index], "row": np.array(first + index, dtype)}
