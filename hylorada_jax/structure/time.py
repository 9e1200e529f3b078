"""What a calendar knows about time series: positions in hours, and fields as structure ids."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np

from hylorada_jax.errors import DataError, require_one_of

_HOUR = 3_600_000_000  # microseconds
_FIELDS = ("hour", "weekday", "month")
_COARSE = ("Y", "M", "W", "D", "h", "m", "s", "ms")  # units of numpy that hold more years


def calendar_positions(
    timestamps: Sequence[Any] | np.ndarray, since: Literal["week", "year"] = "week"
) -> np.ndarray:
    """Where each timestamp stands in the calendar: the ``structure_positions`` of a ``TokenizedDocument``.

        week:  position_i = hours from Monday 00:00 of the week of timestamp 0 to timestamp i
        year:  position_i = hours from 1 January 00:00 of the year of timestamp i to timestamp i

    Counted from a Monday, periods of 24 and 168 hours keep their meaning: equal phases are equal hours of the
    day and of the week, in every series. But the numbers grow, and with them the gradients of an encoder's
    periods, until the clip of the global norm leaves little to all others. So prefer "year" for a series of
    years: the numbers stay below 8,784, and are those of training in every later year; the phase of a week
    jumps at each New Year.

    Timestamps with a time zone count elapsed hours on the clock of the first one: after a change to summer
    time the phases move by an hour. Those without one count as they are.

    Args:
        timestamps: datetimes, numpy datetime64, or strings in ISO 8601, [n]; none before its predecessor.
        since: what the hours are counted from.

    Returns:
        Hours, float64 [n], ≥ 0.

    Raises:
        DataError: a value is not a time (NaT, None, a number), some have a time zone and others not, or one
            is before its predecessor.
        ConfigError: ``since`` is neither.

    Example:
        >>> calendar_positions(["2024-05-01T06:00", "2024-05-01T07:30"])  # a Wednesday
        array([54. , 55.5])
        >>> calendar_positions(["2023-12-31T23:00", "2024-01-02T12:00"], since="year")
        array([8759.,   36.])

    Source: method.md, section 5.
    """
    require_one_of("since", since, ("week", "year"))
    times = _times(timestamps)
    backwards = times[1:] < times[:-1]
    if backwards.any():
        at = int(np.argmax(backwards)) + 1
        raise DataError(
            "A time series must not go back in time.",
            f"timestamp {at} is {times[at]}, after {times[at - 1]}",
            "Sort it; give local times across the end of summer time with their time zone, or in UTC.",
        )
    days = times[:1].astype("datetime64[D]")
    start = times.astype("datetime64[Y]") if since == "year" else days - _weekday(days)
    return (times - start.astype(times.dtype)).astype(np.int64) / _HOUR


def calendar_ids(
    timestamps: Sequence[Any] | np.ndarray, field: Literal["hour", "weekday", "month"]
) -> np.ndarray:
    """A field of the calendar as ``structure_ids``: what no period in hours says, such as the month.

    Args:
        timestamps: as in :func:`calendar_positions`, in any order.
        field: hour (0 … 23), weekday (Monday is 0) or month (January is 0).

    Returns:
        int32 [n].

    Raises:
        DataError: a value is not a time, or some have a time zone and others not.
        ConfigError: the calendar has no such field here.

    Example:
        >>> calendar_ids(["2024-05-01T06:00", "2024-12-31"], "month")
        array([ 4, 11], dtype=int32)
    """
    require_one_of("field", field, _FIELDS)
    times = _times(timestamps)
    days = times.astype("datetime64[D]")
    if field == "weekday":
        ids = _weekday(days)
    elif field == "hour":
        ids = (times - days.astype(times.dtype)).astype("timedelta64[h]")
    else:
        months = times.astype("datetime64[M]")
        ids = months - times.astype("datetime64[Y]").astype(months.dtype)
    return ids.astype(np.int32)


def _weekday(days: np.ndarray) -> np.ndarray:
    """Days since Monday; day 0 of the epoch was a Thursday."""
    return ((days.astype(np.int64) + 3) % 7).astype("timedelta64[D]")


def _times(timestamps: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Timestamps as datetime64 in microseconds on one clock, that of the first."""
    try:
        values = np.asarray(timestamps)
    except ValueError as error:  # rows of several lengths
        values, found = np.empty(()), str(error)
    else:
        found = f"shape {values.shape}"
    if values.ndim != 1:
        raise DataError("Timestamps must be one sequence.", found, "Give one series at a time.")
    if values.dtype.kind != "M":
        moments = [_moment(value, index) for index, value in enumerate(values.tolist())]
        zoned = [moment.utcoffset() is not None for moment in moments]
        if any(zoned) and not all(zoned):
            rule = "All timestamps of a series must have a time zone, or none."
            received = f"{moments[zoned.index(True)]} and {moments[zoned.index(False)]}"
            raise DataError(rule, received, "Give every timestamp its time zone.")
        if any(zoned):
            shift = moments[0].utcoffset()
            moments = [_shifted(moment, shift, index) for index, moment in enumerate(moments)]
        values = np.array(moments, "datetime64[us]")
    times = values.astype("datetime64[us]")
    wrong = np.isnat(values)
    if np.datetime_data(values.dtype)[0] in _COARSE:  # a year that microseconds do not reach becomes another
        wrong |= times.astype(values.dtype) != values
    if wrong.any():
        at = int(np.argmax(wrong))
        raise _no_time(str(values[at]), at)
    return times


def _shifted(moment: datetime, shift: Any, index: int) -> datetime:
    """A moment with a time zone on the clock of another one, which is so far from UTC."""
    try:
        # The zone goes first: pandas' timestamps with one count elapsed time, Python's what a clock shows.
        return moment.replace(tzinfo=None) - moment.utcoffset() + shift  # type: ignore[operator]
    except OverflowError as error:
        raise _no_time(str(moment), index) from error


def _moment(value: Any, index: int) -> datetime:
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError as error:
            raise _no_time(repr(value), index) from error
    if not isinstance(value, datetime) or value != value:  # pandas' NaT is a datetime, unequal to itself
        raise _no_time(repr(value), index)
    return value


def _no_time(received: str, index: int) -> DataError:
    return DataError(
        "Every timestamp must be a time: a datetime, a datetime64 or a string in ISO 8601.",
        f"timestamp {index}: {received}",
        "Fill or drop missing times, and convert numbers: np.array(seconds, 'datetime64[s]').",
    )
