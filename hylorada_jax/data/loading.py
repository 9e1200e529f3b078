"""From rows to batches: a shuffled, repeating iterator whose place can be saved."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import grain
import numpy as np

from hylorada_jax.data.packing import Rows
from hylorada_jax.models.batch import KEYS, Batch

Shares = Sequence[tuple[Rows | Sequence[Batch], float]]
"""The rows of each source, and its weight."""

_ENDLESS = 2**50  # rows; more than anybody trains on
_APART = 0x9E3779B1  # 2³² by the golden ratio, whose multiples lie far apart


def mixed_batches(
    shares: Shares, batch_size: int, seed: int, own: Sequence[int] | None = None
) -> grain.DatasetIterator[Batch]:
    """Batches without end of the rows of several sources, as :class:`hylorada_jax.data.mixture.Mixture` says.

    Of one source every epoch has each row once, in an order of its own; a batch may reach over its end.

    Args:
        shares: what to draw from.
        batch_size: rows per batch.
        seed: of the order.
        own: the places in a batch whose rows are made, as one of several processes needs them; None: all.

    Returns:
        An iterator with ``get_state`` and ``set_state``; a batch also has ``row``, the rows' numbers [batch],
        where the rows of a source are numbered behind those of the ones before it. ``row`` is of all rows,
        whoever makes them: so that order and state are those of one process.
    """
    sources = []
    starts = [0, *itertools.accumulate(len(rows) for rows, _ in shares)]
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        # Not repeat() without a number: grain then divides the largest int by the batch size in floating
        # point, which overflows for a batch of one.
        epochs = _ENDLESS // (end - start) + 1
        # grain adds the epoch to the seed: neighbours would share the orders of all epochs but one.
        order = grain.MapDataset.range(start, end).shuffle(seed=(seed + number) * _APART % 2**32)
        sources.append(order.repeat(epochs))
    places = slice(None) if own is None else [*own]

    def made(drawn: np.ndarray) -> Batch:
        found = []
        for number in drawn[places]:
            source = bisect_right(starts, number) - 1
            found.append(shares[source][0][int(number) - starts[source]])
        arrays = {name: np.stack([row[name] for row in found]) for name in found[0]}
        return arrays | {"row": drawn.astype(KEYS["row"].dtype)}

    dataset = grain.MapDataset.mix(sources, [weight for _, weight in shares]).batch(batch_size).map(made)
    # Making a row takes microseconds, and drawing its number a few milliseconds at most, of sources of a few
    # rows: threads would cost more than they save.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def rows_of_epoch(shares: Shares) -> int:
    """The rows that are drawn until the first source is used up; of one source, all."""
    sources = [grain.MapDataset.range(len(rows)) for rows, _ in shares]
    return len(grain.MapDataset.mix(sources, [weight for _, weight in shares]))
