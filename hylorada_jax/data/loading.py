"""From rows to batches: a shuffled, repeating iterator whose place can be saved."""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from hylorada_jax.data.packing import Rows
from hylorada_jax.models.batch import KEYS, Batch

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

    def numbered(index: int) -> Batch:
        return {**rows[index], "row": np.array(index, KEYS["row"].dtype)}

    # Not repeat() without a number: grain then divides the largest int by the batch size in floating point,
    # which overflows for a batch of one.
    epochs = _ENDLESS // len(rows) + 1
    order = grain.MapDataset.range(len(rows)).shuffle(seed=seed)
    dataset = order.map(numbered).repeat(epochs).batch(batch_size)
    # Making a row takes microseconds: threads would cost more than they save.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
