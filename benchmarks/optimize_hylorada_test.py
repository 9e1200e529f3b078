"""Laws: one program for each rank, a killed study goes on, and what it found trains."""

import json
import math
import time

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import optimize_hylorada, trial
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, HyLoRADAError

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow


def settings(directory, **changes):
    given = {
        "epochs": 1.0, "method": "hylorada", "model": str(directory), "data": str(directory / "texts.txt"),
        "train_tokens": 200, "dev_tokens": 48, "batch_size": 2, "seq_len": 24, "seed": 0,
    }  # fmt: skip
    return given | changes


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr(optimize_hylorada, "RANKS", (2, 3))


def test_a_rank_compiles_one_step_and_a_killed_study_goes_on(tiny, tmp_path, monkeypatch, capsys):
    compiled: list[int] = []
    ranks: list[float] = []
    make, suggest = trial.make_train_step, optimize_hylorada.suggest

    def counted(model, optimizer, config):
        compiled.append(model.config.lora_rank)
        return make(model, optimizer, config)

    def dies_at_the_fourth(proposed):
        if len(ranks) == 3:
            raise KeyboardInterrupt
        chosen = suggest(proposed)
        ranks.append(chosen["rank"])
        return chosen

    monkeypatch.setattr(trial, "make_train_step", counted)
    search = optimize_hylorada.Search(tmp_path, settings(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(optimize_hylorada, "suggest", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            search.run(5)
    assert len(ranks) == 3
    assert sorted(compiled) == sorted(set(ranks))

    search = optimize_hylorada.Search(tmp_path, settings(tiny))
    search.run(5)
    whole = [t for t in search._study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(whole) == 5
    search.run(5)  # nothing is missing
    assert len([t for t in search._study.trials if t.state.name in ("COMPLETE", "PRUNED")]) == 5

    search.report("hylorada finetune")
    best = search._study.best_trial
    assert best.value == min(t.value for t in whole if t.value is not None)
    config = HyLoRADAConfig.load(tmp_path / "best.json")
    assert config == optimize_hylorada.config_of("hylorada", best.params)
    assert config.lora_alpha == pytest.approx(best.params["alpha_ratio"] * best.params["rank"])
    kept = json.loads((tmp_path / "trials.json").read_text())["trials"]
    whole_losses = [list(t["losses"].values()) for t in kept if t["state"] == "COMPLETE"]
    assert {len(losses) for losses in whole_losses} == {optimize_hylorada.EVALUATIONS}
    assert min(losses[-1] for losses in whole_losses) == best.value
    for name in ("history.png", "importance.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    assert f"--learning-rate {best.params['learning_rate']:.3g}" in capsys.readouterr().out


def test_a_trial_is_the_run_that_its_settings_say(tiny, tmp_path):
    """Trained alone, with programs of its own, the second trial of a rank comes to the same loss."""
    search = optimize_hylorada.Search(tmp_path / "study", settings(tiny, method="hylorada_v1"))
    search.run(4)
    trials = [t for t in search._study.trials if t.state.name == "COMPLETE"]
    rank = max({t.params["rank"] for t in trials}, key=[t.params["rank"] for t in trials].count)
    second = [t for t in trials if t.params["rank"] == rank][1]
    jax.clear_caches()
    alone = optimize_hylorada.Search(tmp_path / "alone", settings(tiny, method="hylorada_v1"))
    loss = alone._objective(optuna.trial.FixedTrial(second.params))
    assert loss == pytest.approx(second.value, rel=1e-6)  # float32, the same program


def test_the_history_tells_trials_that_were_stopped_from_those_that_ended():
    study = optuna.create_study()
    whole, stopped = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    for state, losses in ((whole, [3.0, 2.0]), (stopped, [1.5]), (whole, [3.0, 2.5])):
        found = dict(enumerate(losses))
        study.add_trial(optuna.trial.create_trial(state=state, value=losses[-1], intermediate_values=found))
    axes = Figure().subplots()
    optimize_hylorada._history(axes, study)
    drawn = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
    assert drawn == {
        "to the end": [[0, 2.0], [2, 2.5]],
        "stopped early": [[1, 1.5]],
        "best so far": [[0, 2.0], [2, 2.0]],
    }


def test_a_trial_whose_process_died_is_not_under_way_for_ever(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(optimize_hylorada, "HEARTBEAT", 1)
    study = optimize_hylorada.Search(tmp_path, settings(tiny))._study
    dead = study.ask()  # and is never told
    study._storage.record_heartbeat(dead._trial_id)  # type: ignore[attr-defined]
    time.sleep(3)  # two beats are waited for
    search = optimize_hylorada.Search(tmp_path, settings(tiny))
    search.run(1)
    assert [trial.state.name for trial in search._study.trials] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"method": "lora"}, ConfigError, "hylorada"),
        ({"data": "absent.txt"}, DataError, "absent"),
        ({"seq_len": 4000}, DataError, "4000"),
        ({"seq_len": 0}, ConfigError, "seq_len 0"),
        ({"train_tokens": 0}, ConfigError, "0 tokens"),
        ({"dev_tokens": 0}, ConfigError, "0 tokens"),
        *(({"epochs": wrong}, ConfigError, "epochs must be positive") for wrong in (0.0, math.nan, math.inf)),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tiny, tmp_path, changes, error, match):
    # A Search loads a model when it runs.
    with pytest.raises(error, match=match):
        optimize_hylorada.Search(tmp_path, settings(tiny, **changes))
    assert not (tmp_path / "study.db").exists()


def test_a_study_without_a_trial_that_ended_has_no_best(tiny, tmp_path):
    with pytest.raises(HyLoRADAError, match="must end with a finite loss"):
        optimize_hylorada.Search(tmp_path, settings(tiny)).report("a command")
    with pytest.raises(ConfigError, match="n_trials 0"):
        optimize_hylorada.main(n_trials=0, output=tmp_path)


def test_a_study_of_other_settings_is_not_gone_on_with(tiny, tmp_path):
    optimize_hylorada.Search(tmp_path, settings(tiny))
    with pytest.raises(CheckpointError, match=r"epochs 1\.0, now 2\.0"):
        optimize_hylorada.Search(tmp_path, settings(tiny, epochs=2.0))
