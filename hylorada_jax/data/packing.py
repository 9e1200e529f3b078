"""Documents of tokens into rows of one length: windows, packed so that documents cannot see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hylorada_jax.data.document import STRUCTURE, TokenizedDocument
from hylorada_jax.errors import ConfigError
from hylorada_jax.math.loss import IGNORED
from hylorada_jax.models.batch import KEYS, Batch, padding

# What every row has; what a structure encoder reads, it has where the documents do.
_ALWAYS = ("input_ids", "targets", "segment_ids", "document_ids")


class Window(NamedTuple):
    """The tokens start … stop−1 of a document; each predicts its next, from ``new`` on for the first time."""

    document: int
    start: int
    stop: int
    new: int


class Rows:
    """Random access to the rows that a list of documents makes.

    A document of n tokens has n − 1 predictions. It is cut into windows of at most ``seq_len`` inputs, a
    window every ``stride`` tokens, so that every prediction of a scored token counts exactly once, in the
    first window that has it. A window in which nothing counts is left out. Windows are packed into rows of
    ``seq_len`` tokens, best fit, longest first.

    A row has ``input_ids``; ``targets``, the next token or -1 where nothing is predicted or counted;
    ``segment_ids``, 1, 2, 3 … for the windows in the row and 0 for padding, in each of which models count
    positions from 0; and ``document_ids``, the number of each token's document. Where the documents have
    them, it also has the ``structure_ids`` and ``structure_positions`` of its ``input_ids``, 0 for padding.
    Their dtypes are in :mod:`hylorada_jax.models.batch`.

    Args:
        documents: all with the same fields of structure; one of fewer than 2 tokens gives no row.
        seq_len: tokens per row.
        stride: tokens between the starts of windows, 1 … seq_len; None takes ``seq_len`` (no overlap).
        packing: several windows may share a row. Otherwise each has its own, padded on the right.

    Attributes:
        tokens: how many there are in all rows, those in two windows counted twice.

    Raises:
        ConfigError: seq_len or stride is out of range.

    Example:
        >>> question = TokenizedDocument(np.array([5, 6, 7]), scored=np.array([False, False, True]))
        >>> rows = Rows([question, TokenizedDocument(np.array([8, 9]))], seq_len=4)
        >>> {name: values.tolist() for name, values in rows[0].items()}  # doctest: +NORMALIZE_WHITESPACE
        {'input_ids': [5, 6, 8, 0], 'targets': [-1, 7, 9, -1], 'segment_ids': [1, 1, 2, 0],
         'document_ids': [0, 0, 1, 0]}

    Source: the windows are those of the Hugging Face guide "Perplexity of fixed-length models"; best-fit
    packing is Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.
    """

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        seq_len: int,
        *,
        stride: int | None = None,
        packing: bool = True,
    ) -> None:
        check_windows(seq_len, stride)
        self._documents, self._seq_len = documents, seq_len
        self._structure = [
            name for name in STRUCTURE if any(getattr(document, name) is not None for document in documents)
        ]
        self._windows = [
            window
            for number, document in enumerate(documents)
            for window in _cut(number, len(document), seq_len, stride or seq_len)
            if document.scored is None or (_targets(document, window) != IGNORED).any()
        ]
        lengths = [window.stop - window.start for window in self._windows]
        self.tokens = sum(lengths)
        self._rows = best_fit(lengths, seq_len) if packing else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        row = padding([*_ALWAYS, *self._structure], self._seq_len)
        at = 0
        for segment, number in enumerate(self._rows[index], start=1):
            window = self._windows[number]
            document, there = self._documents[window.document], slice(window.start, window.stop)
            here = slice(at, at + window.stop - window.start)
            row["input_ids"][here] = document.tokens[there]
            row["targets"][here] = _targets(document, window)
            row["segment_ids"][here] = segment
            row["document_ids"][here] = window.document
            for name in self._structure:
                row[name][here] = getattr(document, name)[there]
            at = here.stop
        return row


def check_windows(
    seq_len: int, stride: int | None = None, tokens: int | None = None, batch_size: int = 1
) -> None:
    """Raises a ConfigError for windows that never end or leave tokens out, for no tokens, or for no rows."""
    if seq_len < 1:
        raise ConfigError("A window must have a token.", f"seq_len {seq_len}", "Give at least 1.")
    if stride is not None and not 1 <= stride <= seq_len:
        received = f"stride {stride}, seq_len {seq_len}"
        raise ConfigError(
            "Windows must start every 1 … seq_len tokens, or some are left out.", received, "Correct it."
        )
    if tokens is not None and tokens < 1:
        raise ConfigError("A part of the tokens must have one.", f"{tokens} tokens", "Give at least 1.")
    if batch_size < 1:
        raise ConfigError("A batch must have a row.", f"batch_size {batch_size}", "Give at least 1.")


def default_stride(seq_len: int) -> int:
    """That of windows which overlap by half, so that every token is scored behind others."""
    return max(1, seq_len // 2)


def spread(rows: Sequence[Batch] | Rows, tokens: int) -> list[Batch]:
    """As many rows as hold about so many tokens, spread evenly over all of them.

    Args:
        rows: of equal length; padding in them does not count.
        tokens: at least one; all rows are taken where they hold fewer.
    """
    check_windows(1, tokens=tokens)
    if isinstance(rows, Rows):
        held = rows.tokens
    else:
        held = sum(int(np.count_nonzero(row["segment_ids"])) for row in rows)
    count = min(len(rows), max(1, round(tokens * len(rows) / held)))
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
                constant_values=KEYS[name].pad if name in KEYS else 0,
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
    start = new = 0
    while new < inputs:
        stop = min(start + seq_len, inputs)
        yield Window(document, start, stop, new)
        start, new = start + stride, stop


def _targets(document: TokenizedDocument, window: Window) -> np.ndarray:
    """What the tokens of a window predict; ``IGNORED`` where that does not count, at all or once more."""
    predicted = slice(window.start + 1, window.stop + 1)
    counts = np.arange(window.start, window.stop) >= window.new
    if document.scored is not None:
        counts &= document.scored[predicted]
    return np.where(counts, document.tokens[predicted], IGNORED)
