"""Documents of tokens into rows of one length: windows, packed so that documents cannot see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.loss import IGNORED

Batch = dict[str, np.ndarray]
"""Rows of equal length, [rows, seq_len] under each of the names that ``Rows`` lists."""


class Window(NamedTuple):
    """The tokens start … stop−1 of a document; each predicts its next, and counts from ``scored`` on."""

    document: int
    start: int
    stop: int
    scored: int


class Rows:
    """Random access to the rows that a list of documents makes.

    A document of n tokens has n − 1 predictions. It is cut into windows of at most ``seq_len`` inputs, a
    window every ``stride`` tokens, so that every prediction counts exactly once, in the first window that
    has it. Windows are packed into rows of ``seq_len`` tokens, best fit, longest first.

    A row has ``input_ids``; ``targets``, the next token or -1 where nothing is predicted or counted;
    ``segment_ids``, 1, 2, 3 … for the windows in the row and 0 for padding; and ``position_ids``, which
    restart at 0 in every window. Where ``structure`` is given, it also has ``structure_ids``, those of its
    ``input_ids``, 0 for padding; where ``positions`` are, likewise ``structure_positions``, which are
    float32; all others are int32. ``numbered`` adds ``document_ids``, the number of each token's document.

    Args:
        documents: token ids, one [n] int array per document; one of fewer than 2 tokens gives no row.
        seq_len: tokens per row.
        stride: tokens between the starts of windows, 1 … seq_len; None takes ``seq_len`` (no overlap).
        packing: several windows may share a row. Otherwise each has its own, padded on the right.
        structure: structure ids, one [n] int array per document, or None.
        positions: structure positions, such as hours, one [n] float array per document, or None.
        numbered: say which document a token is of, so that an error can.

    Raises:
        ConfigError: seq_len or stride is out of range.

    Example:
        >>> rows = Rows([np.array([5, 6, 7]), np.array([8, 9])], seq_len=4)
        >>> {name: values.tolist() for name, values in rows[0].items()}  # doctest: +NORMALIZE_WHITESPACE
        {'input_ids': [5, 6, 8, 0], 'targets': [6, 7, 9, -1],
         'segment_ids': [1, 1, 2, 0], 'position_ids': [0, 1, 0, 0]}

    Source: the windows are those of the Hugging Face guide "Perplexity of fixed-length models"; best-fit
    packing is Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        seq_len: int,
        *,
        stride: int | None = None,
        packing: bool = True,
        structure: Sequence[np.ndarray] | None = None,
        positions: Sequence[np.ndarray] | None = None,
        numbered: bool = False,
    ) -> None:
        check_windows(seq_len, stride)
        self._documents, self._structure, self._positions = documents, structure, positions
        self._seq_len, self._numbered = seq_len, numbered
        self._windows = [
            window
            for number, tokens in enumerate(documents)
            for window in _cut(number, len(tokens), seq_len, stride or seq_len)
        ]
        lengths = [window.stop - window.start for window in self._windows]
        self._rows = best_fit(lengths, seq_len) if packing else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        row = self._padding()
        at = 0
        for segment, number in enumerate(self._rows[index], start=1):
            window = self._windows[number]
            tokens = self._documents[window.document][window.start : window.stop + 1]
            here = slice(at, at + len(tokens) - 1)
            row["input_ids"][here] = tokens[:-1]
            row["targets"][here] = tokens[1:]
            row["targets"][at : at + window.scored - window.start] = IGNORED
            row["segment_ids"][here] = segment
            row["position_ids"][here] = np.arange(len(tokens) - 1)
            if self._numbered:
                row["document_ids"][here] = window.document
            if self._structure is not None:
                row["structure_ids"][here] = self._structure[window.document][window.start : window.stop]
            if self._positions is not None:
                theirs = self._positions[window.document]
                row["structure_positions"][here] = theirs[window.start : window.stop]
            at = here.stop
        return row

    def _padding(self) -> Batch:
        """A row of nothing else."""
        names = ["input_ids", "targets", "segment_ids", "position_ids"]
        if self._numbered:
            names.append("document_ids")
        if self._structure is not None:
            names.append("structure_ids")
        row = {name: np.zeros(self._seq_len, np.int32) for name in names}
        if self._positions is not None:
            row["structure_positions"] = np.zeros(self._seq_len, np.float32)
        row["targets"][:] = IGNORED
        return row


def check_windows(
    seq_len: int, stride: int | None = None, tokens: int | None = None, batch_size: int = 1
) -> None:
    """Raises a ConfigError for windows that never end or leave tokens out, for no tokens, or for no rows."""
    if seq_len < 1:
        raise ConfigError("A window must have a token", f"seq_len {seq_len}", "Give at least 1.")
    if stride is not None and not 1 <= stride <= seq_len:
        received = f"stride {stride}, seq_len {seq_len}"
        raise ConfigError(
            "Windows must start every 1 … seq_len tokens, or some are left out", received, "Correct it."
        )
    if tokens is not None and tokens < 1:
        raise ConfigError("A part of the tokens must have one", f"{tokens} tokens", "Give at least 1.")
    if batch_size < 1:
        raise ConfigError("A batch must have a row", f"batch_size {batch_size}", "Give at least 1.")


def spread(rows: Sequence[Batch] | Rows, tokens: int) -> list[Batch]:
    """As many rows as hold so many tokens, spread evenly over all of them.

    Args:
        rows: of equal length.
        tokens: at least one; all rows are taken where they hold fewer.
    """
    width = rows[0]["input_ids"].size
    check_windows(width, tokens=tokens)
    count = min(len(rows), -(-tokens // width))
    return [rows[i * len(rows) // count] for i in range(count)]


def batches(rows: Sequence[Batch] | Rows, batch_size: int) -> Iterator[Batch]:
    """Rows once, in order; the last batch is filled up with rows of padding.

    Args:
        rows: of equal length.
        batch_size: rows per batch.

    Returns:
        The batches, [batch_size, ...] under every name.
    """
    for first in range(0, len(rows), batch_size):
        some = [rows[i] for i in range(first, min(first + batch_size, len(rows)))]
        stacked = {name: np.stack([row[name] for row in some]) for name in some[0]}
        missing = batch_size - len(some)
        yield {
            name: np.pad(
                values,
                ((0, missing), *[(0, 0)] * (values.ndim - 1)),
                constant_values=IGNORED if name == "targets" else 0,
            )
            for name, values in stacked.items()
        }


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pieces into rows: the longest piece first, each into the row it leaves least room in.

    Args:
        lengths: length of each piece, 1 … capacity.
        capacity: length of a row.

    Returns:
        The numbers of the pieces in each row.

    Example:
        >>> best_fit([3, 1, 4, 1, 2], 5)
        [[2, 1], [0, 4], [3]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), ascending
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[piece], 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > lengths[piece]:
            insort(room, (left - lengths[piece], row))
    return rows


def _cut(document: int, length: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows of one document; no prediction counts twice."""
    inputs = length - 1  # the last token has nothing to predict
    start = scored = 0
    while scored < inputs:
        stop = min(start + seq_len, inputs)
        yield Window(document, start, stop, scored)
        start, scored = start + stride, stop
