"""A series as tokens, divided by time, and as windows of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.series.data import Series
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.packing import Rows
from hylorada_jax.errors import DataError
from hylorada_jax.exact import fraction
from hylorada_jax.structure.time import calendar_positions

Hours = Literal["own", "year", "asked"]
# Values this many standard deviations from the mean and farther share the outermost bins.
REACH = 4.0


class Quantiser(NamedTuple):
    """Values as one of ``bins`` tokens: equal bins over the mean ± ``REACH`` standard deviations.

    Attributes:
        mean: of the data that the transformation is fixed on.
        std: theirs.
        bins: number of tokens.

    Example:
        >>> quantiser = Quantiser(mean=0.0, std=1.0, bins=8)
        >>> quantiser.tokens(np.array([-9.0, 0.3, 3.9])), quantiser.values(np.array([4]))
        (array([0, 4, 7], dtype=int32), array([0.5]))

    Source: Ansari et al. 2024, "Chronos: Learning the Language of Time Series", section 3.1: scaling, then
    uniform bins.
    """

    mean: float
    std: float
    bins: int

    @classmethod
    def of(cls, values: np.ndarray, bins: int) -> Quantiser:
        """The transformation that is fixed on some values."""
        return cls(float(values.mean()), float(values.std()), bins)

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 * REACH * self.std / self.bins

    def values(self, tokens: np.ndarray) -> np.ndarray:
        """The values that tokens stand for, the middles of their bins; of a mean of tokens, their mean."""
        return self.mean - REACH * self.std + (tokens + 0.5) * self.width

    def tokens(self, values: np.ndarray) -> np.ndarray:
        """The bins of values, int32; those beyond the reach are in the outermost."""
        found = np.floor((values - self.mean + REACH * self.std) / self.width)
        return np.clip(found, 0, self.bins - 1).astype(np.int32)


class Prepared(NamedTuple):
    """A series to predict, its first value left out: from that the first change is taken.

    Attributes:
        series: whose values these are.
        signal: what the tokens stand for: changes, or the values themselves.
        offset: value − signal: the value before, or 0.
        tokens: of the signal.
        hours: of each token, from a Monday, as a structure encoder takes them.
        quantiser: fixed on the part to adapt on.
        dev: where the part begins by which learning rates are chosen; before it is the part to adapt on.
        test: where the part begins that is reported on.
    """

    series: Series
    signal: np.ndarray
    offset: np.ndarray
    tokens: np.ndarray
    hours: np.ndarray
    quantiser: Quantiser
    dev: int
    test: int

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """{adapt, dev, test: [start, stop)}, one after the other in time."""
        return {"adapt": (0, self.dev), "dev": (self.dev, self.test), "test": (self.test, len(self.tokens))}


def prepare(series: Series, bins: int, dev_at: np.datetime64, test_at: np.datetime64) -> Prepared:
    """A series as tokens, divided by time.

    Args:
        series: as it is or thinned.
        bins: number of tokens.
        dev_at: when the part to adapt on ends.
        test_at: when the part to report on begins.
    """
    before, values, times = series.values[:-1], series.values[1:], series.times[1:]
    offset = before if series.changes else np.zeros_like(before)
    dev, test = np.searchsorted(times, np.array([dev_at, test_at], "datetime64[us]")).tolist()
    quantiser = Quantiser.of((values - offset)[:dev], bins)
    return Prepared(
        series=series,
        signal=values - offset,
        offset=offset,
        tokens=quantiser.tokens(values - offset),
        hours=calendar_positions(series.times)[1:],
        quantiser=quantiser,
        dev=dev,
        test=test,
    )


def boundaries(series: Series, dev: float = 0.6, test: float = 0.75) -> tuple[np.datetime64, np.datetime64]:
    """When the parts begin that a learning rate is chosen by, and that is reported on.

    Args:
        series: with all of its values.
        dev: the part of them before the first boundary.
        test: the part before the second.
    """
    count = len(series.times)
    return series.times[math.floor(fraction(dev) * count)], series.times[math.floor(fraction(test) * count)]


def windows(prepared: Prepared, part: str, context: int, hours: Hours | None = None) -> Rows:
    """The rows of a part: for every value that is predicted, the ``context`` tokens before it.

    A row's last prediction is of the part and has exactly that context, which may lie before the part; the
    other predictions of a row have less. Rows to adapt on lie in their part as a whole: it is the first.

    Args:
        prepared: the tokens.
        part: adapt, dev or test.
        context: tokens per row.
        hours: what a structure encoder reads of each token, as :func:`hours_of`; None for nothing.

    Raises:
        DataError: the part has not one window.
    """
    start, stop = prepared.parts[part]
    first = max(start, context)
    if first >= stop:
        raise DataError(
            f"The part to {part} must be longer than the context.",
            f"{stop - start} values of {prepared.series.name}, context {context}",
            "Give a shorter context.",
        )
    times = None if hours is None else hours_of(prepared, hours)
    pieces = [slice(last - context, last + 1) for last in range(first, stop)]
    documents = [
        TokenizedDocument(prepared.tokens[piece], structure_positions=None if times is None else times[piece])
        for piece in pieces
    ]
    return Rows(documents, context, packing=False)


def hours_of(prepared: Prepared, hours: Hours) -> np.ndarray:
    """A time for each token.

    Args:
        prepared: the tokens.
        hours: "own", the token's, from a Monday before the series begins; "year", from the beginning of the
            token's year: small numbers, and in the test the same that training had;
            "asked", like "year", but of the value that the token predicts, whose time is known to whoever
            asks for it. The last token predicts none.
    """
    if hours == "own":
        return prepared.hours
    of_year = calendar_positions(prepared.series.times[1:], since="year")
    return of_year if hours == "year" else np.append(of_year[1:], of_year[-1])


def pretraining_rows(
    series: Sequence[Series], bins: int, context: int, before: np.datetime64, *, copies: int = 16
) -> Rows:
    """Windows of several series, each as values and as changes.

    The series are short, and a model would know them by heart: it sees copies that are stretched, shifted and
    turned upside down at random.

    Args:
        series: what a base model sees.
        bins: number of tokens.
        context: tokens per row.
        before: nothing from then on is used, nor for the transformations.
        copies: of every series.

    Raises:
        DataError: no series is long enough.
    """
    rng = np.random.default_rng(0)  # part of the data set
    pieces: list[np.ndarray] = []
    for one in series:
        values = one.values[one.times < before]
        for signal in (values, np.diff(values)):
            if len(signal) <= context:
                continue
            scaled = (signal - signal.mean()) / signal.std()
            for _ in range(copies):
                stretch, shift = rng.choice([-1, 1]) * np.exp(rng.uniform(-1, 0.5)), rng.normal(scale=0.5)
                tokens = Quantiser(0.0, 1.0, bins).tokens(stretch * scaled + shift)
                pieces += list(np.lib.stride_tricks.sliding_window_view(tokens, context + 1))
    if not pieces:
        names = ", ".join(one.name for one in series)
        raise DataError("A series must be longer than the context.", names, "Give a shorter context.")
    return Rows([TokenizedDocument(piece) for piece in pieces], context, packing=False)
