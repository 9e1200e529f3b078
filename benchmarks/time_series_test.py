"""Laws of the data, oracles by direct computation, and a whole run on next to nothing."""

import datetime
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("statsmodels")

from benchmarks import time_series
from benchmarks.series.baselines import BASELINES, error_of, frequencies_loss
from benchmarks.series.data import target_series
from benchmarks.series.entry import bases_of, last
from benchmarks.series.report import chosen, plot, table
from benchmarks.series.setup import BASE, METHODS, SETTINGS, Budget, adapter, prepared_of
from benchmarks.series.tokens import REACH, Quantiser, boundaries, prepare, pretraining_rows, windows
from benchmarks.trainables import Adapted
from benchmarks.trial import Runner
from hylorada_jax.data.packing import batches
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.evaluation.sweep import Sweep

PREPARED = {name: prepared_of(setting, 64) for name, setting in SETTINGS.items()}


@given(st.floats(-100, 100), st.floats(0.1, 10), st.integers(2, 128), st.data())
def test_a_value_comes_back_within_half_a_bin(mean, std, bins, data):
    quantiser = Quantiser(mean, std, bins)
    values = np.array(data.draw(st.lists(st.floats(-REACH, REACH), min_size=1))) * std + mean
    tokens = quantiser.tokens(values)
    assert tokens.min() >= 0
    assert tokens.max() < bins
    # Half a bin, but for float64's rounding of the values.
    assert np.abs(quantiser.values(tokens) - values).max() <= quantiser.width / 2 + 1e-12 * (abs(mean) + std)
    beyond = quantiser.tokens(mean + std * np.array([-1e3, 1e3]))
    assert beyond.tolist() == [0, bins - 1]


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_follow_each_other_in_time_and_nothing_fitted_sees_the_later_ones(name):
    prepared = PREPARED[name]
    times = prepared.series.times[1:]
    assert (np.diff(times) > np.timedelta64(0)).all()
    parts = list(prepared.parts.values())
    assert [0, *(stop for _, stop in parts)] == [*(start for start, _ in parts), len(times)]
    dev_at, test_at = boundaries(target_series()[SETTINGS[name].series])
    assert times[prepared.dev - 1] < dev_at <= times[prepared.dev]
    assert times[prepared.test - 1] < test_at <= times[prepared.test]
    later = prepared.series.values.copy()
    later[prepared.dev + 1 :] += 100
    changed = prepare(prepared.series._replace(values=later), 64, dev_at, test_at)
    assert changed.quantiser == prepared.quantiser
    for part, (start, stop) in prepared.parts.items():
        rows = windows(prepared, part, SETTINGS[name].context)
        context = SETTINGS[name].context
        assert len(rows) == stop - max(start, context)
        # The last prediction of each row is the part's next value, from the values before it.
        targets = np.array([row["targets"][-1] for row in rows])
        np.testing.assert_array_equal(targets, prepared.tokens[max(start, context) : stop])
        before = prepared.tokens[stop - 1 - context : stop - 1]
        np.testing.assert_array_equal(rows[len(rows) - 1]["input_ids"], before)


def test_pretraining_sees_nothing_from_the_held_out_time_on():
    series = list(target_series().values())
    before = np.datetime64("1980-01-01")
    rows = pretraining_rows(series, 16, 6, before)
    cut = [
        one._replace(values=np.where(one.times < before, one.values, np.random.default_rng(0).random()))
        for one in series
    ]
    changed = pretraining_rows(cut, 16, 6, before)
    assert len(rows) == len(changed) > 1000
    for row, other in zip(rows, changed, strict=True):
        np.testing.assert_array_equal(row["input_ids"], other["input_ids"])


def test_baselines_are_what_their_names_say():
    prepared = PREPARED["elnino-short"]
    values = prepared.series.values
    np.testing.assert_array_equal(BASELINES["last value"](prepared), values[:-1])
    # Of monthly values, a year before is twelve values before.
    np.testing.assert_array_equal(BASELINES["seasonal naive"](prepared)[11:], values[:-12])
    by_month = BASELINES["climatology"](prepared)
    # The first value, January 1950, is left out; the part to adapt on is the following 438.
    march = values[2 : prepared.dev + 1 : 12]
    np.testing.assert_allclose(by_month[1::12], march.mean(), rtol=1e-12)


def test_of_a_series_with_a_trend_baselines_add_changes():
    prepared = PREPARED["co2-short"]
    values, times = prepared.series.values, prepared.series.times
    gap = np.diff(times) / np.timedelta64(7, "D")
    # Where no week is missing, a year before is 52 weeks before; the gaps are all in the first seven years.
    whole = np.flatnonzero(gap > 1).max() + 54
    direct = values[whole - 1 : -1] + values[whole - 52 : -52] - values[whole - 53 : -53]
    np.testing.assert_allclose(BASELINES["seasonal naive"](prepared)[whole - 1 :], direct, rtol=1e-12)
    month = times.astype("datetime64[M]").astype(int) % 12
    at = len(values) - 1
    same = np.flatnonzero(month[1 : prepared.dev + 1] == month[at])
    rate = np.mean(np.diff(values)[same] / gap[same])
    assert BASELINES["climatology"](prepared)[-1] == pytest.approx(
        values[at - 1] + rate * gap[at - 1], rel=1e-9
    )
    error = np.abs(np.diff(values))[prepared.test :].mean()
    assert error_of(prepared, BASELINES["last value"](prepared), "test") == pytest.approx(error)


def hours_of_year(time):
    return (time - datetime.datetime(time.year, 1, 1)).total_seconds() / 3600


@pytest.mark.parametrize("name", ["elnino-short", "co2-irregular"])
def test_the_positions_of_a_batch_are_the_hours_of_its_tokens(name):
    prepared, context = PREPARED[name], SETTINGS[name].context
    start, stop = prepared.parts["dev"]
    elapsed = (prepared.series.times - prepared.series.times[0]) / np.timedelta64(1, "h")
    since = np.array([hours_of_year(time) for time in prepared.series.times.tolist()])
    own, of_year, asked = (
        np.concatenate(
            [batch["structure_positions"] for batch in batches(windows(prepared, "dev", context, hours), 8)]
        )
        for hours in ("own", "year", "asked")
    )
    shift = prepared.hours[0] - elapsed[1]
    assert 0 <= shift < 7 * 24
    for row, at in enumerate(range(start, stop)):
        # Token i is of the value i + 1: the first value has no change.
        np.testing.assert_array_equal(own[row], np.float32(shift + elapsed[1:][at - context : at]))
        np.testing.assert_array_equal(of_year[row], since[1:][at - context : at].astype("f4"))
        np.testing.assert_array_equal(asked[row], since[1:][at - context + 1 : at + 1].astype("f4"))
    assert "structure_positions" not in windows(prepared, "dev", context)[0]


TINY = Budget(
    settings=("elnino-short", "co2-irregular"),
    seeds=(3, 4),
    learning_rates=(1e-2, 1e-4),
    pretrain_steps=2,
    steps=3,
    batch_size=2,
    bins=8,
    hidden_size=8,
    layers=1,
    rank=2,
)


@pytest.fixture(scope="module")
def found():
    """A whole run."""
    return time_series.run(TINY)


@pytest.mark.slow
def test_every_method_tries_each_rate_and_goes_on_with_its_best(found):
    assert json.loads(json.dumps(found))["settings"]["seeds"] == list(TINY.seeds)
    for name in TINY.settings:
        labels = [
            BASE,
            *(label for label, m in METHODS.items() if SETTINGS[name].kept < 1 or not m.irregular_only),
        ]
        assert list(dict.fromkeys(r["method"] for r in found["runs"] if r["setting"] == name)) == labels
        for label in labels[1:]:
            runs = [run for run in found["runs"] if (run["setting"], run["method"]) == (name, label)]
            first = {run["rate"]: run["dev_loss"] for run in runs if run["seed"] == 3}
            assert len(runs) == len(first) + 1 == 3
            best = chosen(found, name, label)
            assert [run["seed"] for run in best] == [3, 4]
            assert best[0]["dev_loss"] == min(first.values())
            assert len(runs[0]["losses"]) == TINY.steps


@pytest.mark.slow
def test_the_first_loss_is_the_bases_for_every_method_of_a_seed(found):
    for name in TINY.settings:
        for seed in TINY.seeds:
            runs = [run for run in found["runs"] if (run["setting"], run["seed"]) == (name, seed)]
            first = [run["losses"][0] for run in runs if "losses" in run]
            assert max(first) - min(first) < 1e-4, first  # float32, and rounded to 1e-5
            base = next(run for run in runs if run["method"] == BASE)
            assert all(run["loss"] != base["loss"] for run in runs if run is not base)


@pytest.mark.slow
def test_the_table_and_the_plot_are_of_the_runs(found, tmp_path):
    text = table(found)
    for name in TINY.settings:
        assert f"{found['baselines'][name]['climatology']['mae']:.3f}" in text
        values = [run["mae"] for run in chosen(found, name, "hylorada_v2, hours")]
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in text
    # Of two rates each is an end.
    adapted = [line for line in text.splitlines() if any(f"| {label} |" in line for label in METHODS)]
    assert all(" † |" in line for line in adapted)
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_frequencies_are_those_of_the_part_to_adapt_on():
    prepared = PREPARED["elnino-short"]
    known = prepared.tokens[: prepared.dev].tolist()
    p = [(known.count(token) + 1) / (len(known) + 64) for token in prepared.tokens[prepared.test :].tolist()]
    assert frequencies_loss(prepared, "test") == pytest.approx(-np.log(p).mean())


@pytest.mark.slow
def test_a_trained_v2_reads_the_hours_and_v1_cannot():
    prepared = prepared_of(SETTINGS["elnino-short"], TINY.bins)
    base = bases_of(TINY, "elnino")[0]
    right = windows(prepared, "dev", 6, "own")
    later = windows(prepared._replace(hours=prepared.hours + 24 * 91), "dev", 6, "own")

    def losses(method):
        entrant = Adapted(base, adapter(METHODS[method], TINY.rank, 6))
        runner = Runner(windows(prepared, "adapt", 6, "own"))
        training = TINY.training(right, steps=30, rate=1e-2, seed=0)
        sweep = Sweep(entrant.model, last)
        adapters, _ = runner.train(entrant, training)
        return [
            np.concatenate([values[0] for _, values in sweep(rows, 64, adapters=adapters)])[: len(rows)]
            for rows in (right, later)
        ]

    as_trained, a_season_later = losses("hylorada_v2, hours")
    assert np.abs(as_trained - a_season_later).max() > 1e-3
    with pytest.raises(ConfigError, match="structure_positions"):
        losses("hylorada_v1")


def test_losses_and_errors_are_of_the_last_target_and_the_predicted_mean():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, 5, 4)).astype("f4"), rng.normal(size=(7, 4)).astype("f4")
    targets = rng.integers(0, 7, (3, 5))
    losses, means = last(jnp.asarray(hidden), jnp.asarray(head), None, {"targets": jnp.asarray(targets)})
    logits = hidden[:, -1].astype(float) @ head.T.astype(float)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    # float32: a sum of four products, and of seven exponentials.
    np.testing.assert_allclose(losses, -np.log(p[np.arange(3), targets[:, -1]]), rtol=1e-5)
    np.testing.assert_allclose(means, p @ np.arange(7), rtol=1e-5)


def test_without_statsmodels_nothing_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no package statsmodels\n.*pip install"):
        time_series.main(TINY, output=tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": ("nile",)}, "co2-short"),
        ({"seeds": (1, 1)}, "each once"),
        ({"steps": 0}, "positive"),
        ({"hidden_size": 12}, "multiple of 8"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        Budget(**change)


def test_a_context_longer_than_a_part_is_refused():
    with pytest.raises(DataError, match="shorter context"):
        windows(PREPARED["elnino-short"], "adapt", 500)
    with pytest.raises(DataError, match="shorter context"):
        pretraining_rows(list(target_series().values()), 8, 5000, np.datetime64("1980"))
