"""Against a stand-in for wandb, which writes down what it is told, and fails where it is to fail."""

import importlib.util
import json
import sys
import warnings

import pytest

from hylorada_jax.errors import ConfigError
from hylorada_jax.io.hub import offline
from hylorada_jax.training.best_test import be_quick, dying, run
from hylorada_jax.training.report import read_metrics
from hylorada_jax.training.trainer import HyLoRADATrainer
from hylorada_jax.training.trainer_test import settings, texts, tiny_model

STAND_IN = """
import json, os
from pathlib import Path

TOLD, FAILS = Path(__file__).with_name("told.jsonl"), Path(__file__).with_name("fails")

def told(what, **how):
    if FAILS.exists() and FAILS.read_text() == what:
        raise ConnectionError("no network")
    with TOLD.open("a") as file:
        file.write(json.dumps([what, how]) + "\\n")

class Run:
    def __init__(self, id):
        self.id = id
        sent = [how["step"] for what, how in lines() if what == "log" and how["id"] == id]
        self.step = max(sent, default=-1) + 1

    def log(self, values, step):
        assert step >= self.step
        self.step = step
        told("log", id=self.id, values=values, step=step)

    def finish(self, exit_code):
        told("finish", exit_code=exit_code)

def lines():
    return [json.loads(line) for line in TOLD.read_text().splitlines()] if TOLD.exists() else []

def init(**how):
    told("init", **how)
    return Run(how["id"])
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The directory of the stand-in."""
    place = tmp_path / "packages"
    place.mkdir()
    (place / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(place)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield place
    sys.modules.pop("wandb", None)


def told(place, what):
    calls = [json.loads(line) for line in (place / "told.jsonl").read_text().splitlines()]
    return [how for name, how in calls if name == what]


def sent(place):
    return [{"step": how["step"], **how["values"]} for how in told(place, "log")]


def test_a_run_is_one_run_there_however_often_it_is_resumed(tmp_path, base, wandb, monkeypatch):
    directory = tmp_path / "lr=0.1" / "seed 3"
    with dying(monkeypatch, after=3):
        run(directory, base, report_to="wandb")
    run(directory, base, report_to="wandb", resume=True)
    first, second = told(wandb, "init")
    assert first["id"] == second["id"] == json.loads((directory / "run.json").read_text())["id"]
    assert (first["project"], first["name"], first["resume"], first["mode"]) == (
        "hylorada",
        "seed 3",
        "allow",
        None,
    )
    assert first["config"]["training"]["learning_rate"] == 1e-2
    assert first["config"]["adapter"]["lora_rank"] == 2
    assert [how["exit_code"] for how in told(wandb, "finish")] == [1, 0]
    # Nothing twice, and nothing less.
    assert sent(wandb) == read_metrics(directory / "metrics.jsonl")
    run(directory, base, report_to="wandb", overwrite=True)
    assert told(wandb, "init")[-1]["id"] != first["id"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_network_that_fails_costs_the_run_nothing_and_the_rest_is_sent_later(tmp_path, base, wandb, fails):
    expected = run(tmp_path / "expected", base)
    (wandb / "fails").write_text(fails)
    with pytest.warns(
        UserWarning, match=r"without Weights & Biases \(ConnectionError: no network\)"
    ) as caught:
        assert run(tmp_path / "run", base, report_to="wandb") == expected
    assert len(caught) == 1
    (wandb / "fails").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path / "run", base, report_to="wandb", resume=True) == expected
    assert sent(wandb) == read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_its_own_environment_wins_and_offline_it_contacts_nothing(tmp_path, base, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "this")
    with offline():
        run(tmp_path / "run", base, report_to="wandb")
    (how,) = told(wandb, "init")
    assert (how["project"], how["name"], how["mode"]) == ("mine", "this", "offline")


@pytest.mark.parametrize("beside", [False, True], ids=["nothing", "its files"])
def test_where_it_is_not_installed_nothing_begins(tmp_path, base, monkeypatch, beside):
    monkeypatch.syspath_prepend(tmp_path)
    if beside:  # the directory that it keeps where it is run, which Python takes for a package
        (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    found = importlib.util.find_spec("wandb")
    if found is not None and found.origin:
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r'no package wandb[\s\S]*pip install "hylorada\[wandb\]"'):
        HyLoRADATrainer(base, texts(), None, settings(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_it_is_not_asked_unless_that_is_wished(tmp_path, base, wandb):
    run(tmp_path / "run", base)
    assert not (wandb / "told.jsonl").exists()
