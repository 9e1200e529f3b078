"""Real series with their times."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, NamedTuple

import numpy as np

from benchmarks.experiment import INSTALL
from hylorada_jax.errors import require_packages


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
        ConfigError: it is not.
    """
    require_packages("The series of this experiment come with statsmodels.", ["statsmodels"], INSTALL)


def statsmodels_version() -> str:
    """That of the package that the series come with."""
    return importlib.metadata.version("statsmodels")


def target_series() -> dict[str, Series]:
    """What is adapted to: a weekly and a monthly series, both with a year's season.

    Returns:
        co2: CO2 over Mauna Loa, weekly, 1958–2001, as changes, without the weeks that have no value. elnino:
        the sea's surface temperature in the region Niño 1+2, monthly, 1950–2010, as it is.

    Raises:
        ConfigError: statsmodels is not installed.
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
        ConfigError: statsmodels is not installed.
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
