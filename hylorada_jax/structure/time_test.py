"""Oracle: Python's own calendar."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.structure.time import calendar_ids, calendar_positions

moments = st.lists(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)), min_size=1, max_size=6)


@given(moments)
def test_positions_count_hours_from_a_monday_and_keep_the_phases_of_day_and_week(series):
    series = sorted(series)
    first = series[0]
    monday = datetime.combine(first.date() - timedelta(days=first.weekday()), datetime.min.time())
    found = calendar_positions(series)
    assert found.dtype == np.float64
    assert 0 <= found[0] < 168
    # One float64 division away; timedelta's is the exact quotient rounded.
    np.testing.assert_allclose(found, [(t - monday) / timedelta(hours=1) for t in series], rtol=1e-15)
    # A microsecond is 3e-10 h, and 300 years are 3e6 h, of which float64 tells 5e-10 apart.
    hours = [t.hour + t.minute / 60 + (t.second + t.microsecond * 1e-6) / 3600 for t in series]
    np.testing.assert_allclose((found - hours + 1) % 24, 1, atol=2e-9)
    np.testing.assert_array_equal((found + 1e-9) % 168 // 24, [t.weekday() for t in series])


@given(moments)
def test_fields_are_those_of_the_calendar(series):
    assert calendar_ids(series, "hour").tolist() == [t.hour for t in series]
    assert calendar_ids(series, "weekday").tolist() == [t.weekday() for t in series]
    assert calendar_ids(series, "month").tolist() == [t.month - 1 for t in series]
    assert calendar_ids(series, "hour").dtype == np.int32


def test_every_form_of_a_timestamp_gives_the_same_positions():
    texts = ["2024-05-01T06:00:00", "2024-05-01T07:30:00", "2025-01-01T00:00:00"]
    series = [datetime.fromisoformat(text) for text in texts]
    expected = [54, 55.5, 54 - 6 + 24 * 245]  # a Wednesday; 245 days from 1 May to 1 January
    for form in (
        texts,
        np.array(texts),
        series,
        np.array(texts, "datetime64[s]"),
        np.array(texts, "datetime64[ns]"),
        [np.datetime64(text) for text in texts],
        [t.replace(tzinfo=UTC) for t in series],
        [text + "Z" for text in texts],
    ):
        assert calendar_positions(form).tolist() == expected
    assert calendar_positions([]).tolist() == []


def test_time_zones_count_elapsed_hours_on_the_clock_of_the_first():
    berlin = ZoneInfo("Europe/Berlin")
    # Monday; summer time ends on Sunday 27 October 2024 at 3:00, which is 2:00 again.
    series = [datetime(2024, 10, 21, 8, tzinfo=berlin), datetime(2024, 10, 28, 8, tzinfo=berlin)]
    assert calendar_positions(series).tolist() == [8, 8 + 168 + 1]
    east = timezone(timedelta(hours=5))
    same = [t.astimezone(zone) for t, zone in zip(series, (east, UTC), strict=True)]
    assert calendar_positions(same).tolist() == [11, 11 + 168 + 1]  # Berlin's 8:00 is 11:00 five hours east
    # Twice 2:30 on the clock, one hour apart.
    twice = [datetime(2024, 10, 27, 2, 30, tzinfo=berlin, fold=fold) for fold in (0, 1)]
    assert np.diff(calendar_positions(twice)).tolist() == [1]


def test_pandas_timestamps_of_a_time_zone_are_those_of_python():
    pandas = pytest.importorskip("pandas")
    for day in ("2024-03-30", "2024-10-26"):  # summer time begins, and ends
        series = pandas.date_range(day, periods=96, freq="30min", tz="Europe/Berlin")
        expected = calendar_positions([moment.to_pydatetime() for moment in series])
        assert np.diff(expected).tolist() == [0.5] * 95
        assert calendar_positions(list(series)).tolist() == expected.tolist()


def test_hours_of_the_year_start_anew_with_each_year():
    moments = [datetime(2023, 12, 31, 23, 30), datetime(2024, 1, 1), datetime(2024, 12, 31, 23)]
    expected = [(moment - datetime(moment.year, 1, 1)).total_seconds() / 3600 for moment in moments]
    assert calendar_positions(moments, since="year").tolist() == expected
    with pytest.raises(ConfigError, match="since"):
        calendar_positions(moments, since="month")  # type: ignore[arg-type]


def test_float32_tells_seconds_apart_after_years():
    hours = calendar_positions(["2024-01-01T00:00", "2027-01-01T00:00:00", "2027-01-01T00:00:10"])
    assert len(set(hours.astype(np.float32).tolist())) == 3


@pytest.mark.parametrize(
    ("series", "said"),
    [
        (["2024-01-02", "2024-01-01"], "timestamp 1"),
        (["2024-01-02", "NaT"], "timestamp 1"),
        (np.array(["2024-01-02", "NaT"], "datetime64[s]"), "timestamp 1: NaT"),
        ([datetime(2024, 1, 1), None], "timestamp 1: None"),
        (["yesterday"], "yesterday"),
        ([0.0, 3600.0], "timestamp 0: 0.0"),
        ([datetime(2024, 1, 1), datetime(2024, 1, 2, tzinfo=UTC)], "time zone"),
        ([["2024-01-01"]], "one sequence"),
        ([["2024-01-01"], ["2024-01-01", "2024-01-02"]], "one sequence"),
        (None, "one sequence"),
        (["0001-01-01T00:00+23:59", "0001-01-01T00:00+00:00"], "timestamp 0: 0001"),
        (["9999-12-31T23:59+00:00", "9999-12-31T23:59-23:59"], "timestamp 1: 9999"),
        (np.array(["2024", "300000"], "datetime64[Y]"), "timestamp 1: 300000"),
    ],
)
def test_what_is_no_series_is_named(series, said):
    with pytest.raises(DataError, match=said):
        calendar_positions(series)


def test_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="weekday"):
        calendar_ids(["2024-01-01"], "day")  # type: ignore[arg-type]
