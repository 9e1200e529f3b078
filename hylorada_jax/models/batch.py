"""What a batch of rows is made of: the one table of its arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from hylorada_jax.math.loss import IGNORED

Batch = dict[str, np.ndarray]
"""Rows of equal length, [rows, seq_len] under each of the names of ``KEYS``; or one row, [seq_len]."""


class Key(NamedTuple):
    """An array of a batch.

    Attributes:
        dtype: of its values.
        pad: the value where a row has no token.
        reader: who reads it: the model, the loss, or a report of what went wrong, which is made on the host.
    """

    dtype: type[np.generic]
    pad: int
    reader: Literal["model", "loss", "report"]


KEYS = {
    "input_ids": Key(np.int32, 0, "model"),
    "segment_ids": Key(np.int32, 0, "model"),  # 1, 2, 3 … for the windows in a row; each counts from 0
    "structure_ids": Key(np.int32, 0, "model"),
    "structure_positions": Key(np.float32, 0, "model"),
    "targets": Key(np.int32, IGNORED, "loss"),  # the next token, where it counts
    "document_ids": Key(np.int32, 0, "report"),  # the number of each token's document
    "row": Key(np.int32, 0, "report"),  # [rows], the number of each row among all
}


def padding(names: Iterable[str], seq_len: int) -> Batch:
    """A row without a token, to be filled.

    Args:
        names: keys of ``KEYS``.
        seq_len: tokens per row.

    Example:
        >>> padding(["input_ids", "targets"], 2)
        {'input_ids': array([0, 0], dtype=int32), 'targets': array([-1, -1], dtype=int32)}
    """
    return {name: np.full(seq_len, KEYS[name].pad, KEYS[name].dtype) for name in names}


def computed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch that a step computes with; the others stay on the host."""
    return {name: values for name, values in batch.items() if KEYS[name].reader != "report"}
