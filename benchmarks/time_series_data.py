"""Real series with their times: as tokens to predict, as what is known without a model, and as windows."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from hylorada_jax.errors import DataError
from hylorada_jax.structure.time import calendar_ids, calendar_positions
from hylorada_jax.training.packing import Rows

YEAR = np.timedelta64(365 * 24 + 6, "h")
Told = Literal["own", "year", "asked"]
# Values this many standard deviations from the mean and farther share the outermost bins.
REACH = 4.0


class Series(NamedTuple):
    """Values of a quantity at rising times.

    Attributes:
        name: of the data set.
        unit: of the values.
        times: datetime64[us] [n], rising.
        values: [n].
        changes: what is predicted is the change from value to value: the values have a trend.
    """

    name: str
    unit: str
    times: np.ndarray
    values: np.ndarray
    changes: bool


def require_statsmodels() -> None:
    """Raises where the package that has the series is not installed.

    Raises:
        DataError: it is not.
    """
    if importlib.util.find_spec("statsmodels") is None:
        raise DataError(
            "The series of this experiment come with statsmodels", "it is not installed", _INSTALL
        )


_INSTALL = "Install it: pip install statsmodels==0.15.0 -c constraints.txt"


def statsmodels_version() -> str:
    """That of the package that the series come with."""
    return importlib.metadata.version("statsmodels")


def target_series() -> dict[str, Series]:
    """What is adapted to: a weekly and a monthly series, both with a year's season.

    Returns:
        co2: CO2 over Mauna Loa, weekly, 1958–2001, as changes, without the weeks that have no value. elnino:
        the sea's surface temperature in the region Niño 1+2, monthly, 1950–2010, as it is.

    Raises:
        DataError: statsmodels is not installed.
    """
    co2 = _table("co2")["co2"].dropna()
    months = _table("elnino")
    first = np.datetime64(f"{int(months['YEAR'].iloc[0])}-01", "M")
    temperatures = months.drop(columns="YEAR").to_numpy(float).reshape(-1)
    return {
        "co2": Series("co2", "ppm", co2.index.to_numpy("datetime64[us]"), co2.to_numpy(float), True),
        "elnino": Series(
            "elnino", "°C", _from(first, len(temperatures)).astype("datetime64[us]"), temperatures, False
        ),
    }


def other_series() -> list[Series]:
    """What a base model is pretrained on beside the target that it is not adapted to.

    Returns:
        Sunspots and the Nile's volume, yearly, and the quarterly columns of the US economy.

    Raises:
        DataError: statsmodels is not installed.
    """
    found = []
    for name, year, column in (("sunspots", "YEAR", "SUNACTIVITY"), ("nile", "year", "volume")):
        table = _table(name)
        times = _from(np.datetime64(str(int(table[year].iloc[0])), "Y"), len(table))
        found.append(Series(name, "", times.astype("datetime64[us]"), table[column].to_numpy(float), False))
    table = _table("macrodata")
    first = np.datetime64(str(int(table["year"].iloc[0])), "Y").astype("datetime64[M]")
    quarters = _from(first, 3 * len(table))[::3].astype("datetime64[us]")
    for column in table.columns.drop(["year", "quarter"]):
        found.append(Series(f"macrodata {column}", "", quarters, table[column].to_numpy(float), False))
    return found


def _table(name: str) -> Any:
    require_statsmodels()
    return importlib.import_module(f"statsmodels.datasets.{name}").load().data


def _from(first: np.datetime64, count: int) -> np.ndarray:
    """So many steps of a calendar from the first."""
    return first + np.arange(count)


def thinned(series: Series, kept: float, seed: int) -> Series:
    """A series without values at random times.

    Args:
        series: of any spacing.
        kept: part of the values that stay, in (0, 1].
        seed: of the choice.
    """
    stay = np.random.default_rng(seed).random(len(series.values)) < kept
    return series._replace(times=series.times[stay], values=series.values[stay])


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
    return series.times[int(dev * count)], series.times[int(test * count)]


def windows(prepared: Prepared, part: str, context: int, hours: Told | None = None) -> Rows:
    """The rows of a part: for every value that is predicted, the ``context`` tokens before it.

    A row's last prediction is of the part and has exactly that context, which may lie before the part; the
    other predictions of a row have less. Rows to adapt on lie in their part as a whole: it is the first.

    Args:
        prepared: the tokens.
        part: adapt, dev or test.
        context: tokens per row.
        hours: what a structure encoder is told of each token, as :func:`told`; None for nothing.

    Raises:
        DataError: the part has not one window.
    """
    start, stop = prepared.parts[part]
    first = max(start, context)
    if first >= stop:
        raise DataError(
            f"The part to {part} must be longer than the context",
            f"{stop - start} values of {prepared.series.name}, context {context}",
            "Give a shorter context.",
        )
    pieces = [slice(last - context, last + 1) for last in range(first, stop)]
    positions = None if hours is None else [told(prepared, hours)[piece] for piece in pieces]
    tokens = [prepared.tokens[piece] for piece in pieces]
    return Rows(tokens, context, packing=False, positions=positions)


def told(prepared: Prepared, hours: Told) -> np.ndarray:
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
    times = prepared.series.times[1:]
    of_year = (times - times.astype("datetime64[Y]").astype(times.dtype)) / np.timedelta64(1, "h")
    return of_year if hours == "year" else np.append(of_year[1:], of_year[-1])


def frequencies_loss(prepared: Prepared, part: str) -> float:
    """The mean loss in nats of tokens that are drawn as often as in the part to adapt on, and once more.

    Args:
        prepared: the tokens.
        part: which of them count.
    """
    counts = 1 + np.bincount(prepared.tokens[: prepared.dev], minlength=prepared.quantiser.bins)
    start, stop = prepared.parts[part]
    return float(-np.log(counts / counts.sum())[prepared.tokens[start:stop]].mean())


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
        raise DataError("A series must be longer than the context", names, "Give a shorter context.")
    return Rows(pieces, context, packing=False)


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
