"""What is known of a series without a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.series.tokens import Prepared
from hylorada_jax.structure.time import calendar_ids

YEAR = np.timedelta64(365 * 24 + 6, "h")


def last_value(prepared: Prepared) -> np.ndarray:
    """The value before each value."""
    return prepared.series.values[:-1]


def seasonal_naive(prepared: Prepared) -> np.ndarray:
    """The value a year before each value; of a series with a trend, the last value and a year ago's change.

    A year before is the observation nearest to that time.
    """
    times, values = prepared.series.times, prepared.series.values
    year_ago = values[_nearest(times, times - YEAR)]
    if not prepared.series.changes:
        return year_ago[1:]
    return values[:-1] + np.diff(year_ago)


def climatology(prepared: Prepared) -> np.ndarray:
    """The mean of each value's month in the part to adapt on; with a trend, of the changes per hour."""
    months = calendar_ids(prepared.series.times[1:], "month")
    gaps = np.diff(prepared.series.times) / np.timedelta64(1, "h")
    scale = gaps if prepared.series.changes else np.ones_like(gaps)
    start, stop = prepared.parts["adapt"]
    known, rates = months[start:stop], prepared.signal[start:stop] / scale[start:stop]
    means = np.array(
        [rates[known == month].mean() if month in known else rates.mean() for month in range(12)]
    )
    return prepared.offset + scale * means[months]


BASELINES: dict[str, Callable[[Prepared], np.ndarray]] = {
    "last value": last_value,
    "seasonal naive": seasonal_naive,
    "climatology": climatology,
}
"""What needs no model: a prediction of every value, in the order of the tokens."""


def error_of(prepared: Prepared, predicted: np.ndarray, part: str) -> float:
    """The mean absolute error of predicted values, in the series' unit.

    Args:
        prepared: has the true ones.
        predicted: a prediction of every value, as those of ``BASELINES``.
        part: which of them count: dev or test.
    """
    start, stop = prepared.parts[part]
    return float(np.abs(predicted - prepared.series.values[1:])[start:stop].mean())


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The indices of the times nearest to those wanted, the earlier of two."""
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    earlier = wanted - times[after - 1] <= times[after] - wanted
    return after - earlier


def frequencies_loss(prepared: Prepared, part: str) -> float:
    """The mean loss in nats of tokens that are drawn as often as in the part to adapt on, and once more.

    Args:
        prepared: the tokens.
        part: which of them count.
    """
    counts = 1 + np.bincount(prepared.tokens[: prepared.dev], minlength=prepared.quantiser.bins)
    start, stop = prepared.parts[part]
    return float(-np.log(counts / counts.sum())[prepared.tokens[start:stop]].mean())
