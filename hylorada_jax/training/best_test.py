"""Laws of what a run ends with, and when. Its steps and its evaluations are stand-ins that take no time."""

import contextlib
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import CheckpointError, DataError
from hylorada_jax.evaluation.perplexity import Perplexity
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.training import trainer as trainer_module
from hylorada_jax.training.checkpoint import Checkpoints
from hylorada_jax.training.report import read_metrics
from hylorada_jax.training.step import TrainState
from hylorada_jax.training.trainer import HyLoRADATrainer
from hylorada_jax.training.trainer_test import numbers, settings, texts, tiny_model, train

# Held out, by step: new bests are those of steps 0, 1, 4 and 8, for a tie is none.
LOSSES = (4.0, 3.0, 3.5, 3.0, 2.0, 2.5, 2.0, 2.25, 1.0)
SETTINGS = {
    "steps": 8, "eval_every": 1, "checkpoint_every": 5, "keep_checkpoints": 1, "keep": "best", "patience": 3,
    "progress": False,
}  # fmt: skip


def be_quick(patched):
    """Puts adapters that are nothing but the number of their step in the place of computed ones."""

    def init_state(adapters, _, seed, *__):
        nothing = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), adapters)
        return TrainState(jnp.int32(0), jnp.uint32(seed), nothing, np.zeros(1, np.float32))

    def train_step(state, *_):
        state = state._replace(step=state.step + 1, adapters=jax.tree.map(lambda x: x + 1, state.adapters))
        return state, dict.fromkeys(("loss", "grad_norm", "adapter_norm", "tokens"), np.float32(1))

    def evaluate(adapters, *_, **__):
        return Perplexity(LOSSES[step_of(adapters)], 100)

    patched.setattr(trainer_module, "init_state", init_state)
    patched.setattr(trainer_module, "make_train_step", lambda *_: train_step)
    patched.setattr(trainer_module, "_evaluator", lambda *_: evaluate)
    patched.setattr(trainer_module, "plot_losses", lambda *_: None)


def step_of(adapters):
    (step,) = {float(value) for leaf in jax.tree.leaves(adapters) for value in np.unique(leaf)}
    return int(step)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


@pytest.fixture(scope="module")
def base():
    return tiny_model()


def run(directory, base, **changes):
    """What a run is when it has ended."""
    model = HyLoRADAModel(base.base, base.config)
    _, result = train(directory, model, **SETTINGS | changes)
    saved = HyLoRADAModel.from_pretrained(base.base, result.adapter)
    assert step_of(saved.adapters) == step_of(model.adapters) == result.kept
    assert result.perplexity_after == math.exp(LOSSES[result.kept])
    kept = Checkpoints(directory / "checkpoints", 1).steps
    return result.kept, result.steps, kept, numbers(read_metrics(result.metrics))


@contextlib.contextmanager
def dying(monkeypatch, *, before=None, after=None):
    """Within it, a run ends with an error before its n-th checkpoint, or when that is complete."""
    save, saves = Checkpoints.save, iter(range(100))

    def save_or_die(self, *arguments, **options):
        if (number := next(saves)) == before:
            raise RuntimeError("killed")
        save(self, *arguments, **options)
        if number == after:
            self.wait()
            raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_or_die)
        with pytest.raises(RuntimeError, match="killed"):
            yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base):
    with pytest.MonkeyPatch.context() as patched:
        be_quick(patched)
        return run(tmp_path_factory.mktemp("undisturbed") / "run", base)


def test_the_best_is_kept_and_patience_ends_the_run(undisturbed):
    kept, steps, checkpoints, metrics = undisturbed
    assert (kept, steps) == (4, 7)
    assert kept == np.argmin(LOSSES[: steps + 1])
    assert checkpoints == [4, 7]
    assert [r["eval_loss"] for r in metrics if "eval_loss" in r] == list(LOSSES[:8])
    assert [r["step"] for r in metrics if "loss" in r] == list(range(1, 8))


# Of steps 0, 1, 4, 5 and 7: the bests, one that is due, and the last.
@pytest.mark.parametrize("save", range(5))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same(
    tmp_path, base, undisturbed, monkeypatch, when, save
):
    with dying(monkeypatch, **{when: save}):
        run(tmp_path / "run", base)
    assert run(tmp_path / "run", base, resume=True) == undisturbed


def test_an_older_checkpoint_has_the_best_of_its_time(tmp_path, base, undisturbed, monkeypatch):
    changes = {"checkpoint_every": 2, "keep_checkpoints": 2}
    with dying(monkeypatch, after=3):
        run(tmp_path / "run", base, **changes)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert Checkpoints(checkpoints, 2).steps == [1, 2, 4]
    os.truncate(checkpoints / "4" / "run" / "metadata", 0)
    with pytest.warns(UserWarning, match="going on from step 2"):
        kept, steps, _, metrics = run(tmp_path / "run", base, resume=True, **changes)
    assert (kept, steps, metrics) == (*undisturbed[:2], undisturbed[3])


def test_a_run_that_has_ended_can_be_resumed_with_other_wishes(tmp_path, base, undisturbed, capsys):
    directory = tmp_path / "run"
    run(directory, base)
    said = capsys.readouterr().out
    assert (
        said
        == "stopped after step 7: the held-out perplexity was least at step 4, 7.389, and the patience is 3\n"
    )
    assert run(directory, base, resume=True) == undisturbed
    assert capsys.readouterr().out == said
    assert run(directory, base, resume=True, patience=None)[:3] == (8, 8, [8])
    assert run(directory, base, resume=True)[:3] == (8, 8, [8])
    assert capsys.readouterr().out == ""
    assert run(tmp_path / "last", base, keep="last")[:3] == (7, 7, [7])


def test_a_best_that_is_not_there_is_an_error_and_the_last_can_be_had(tmp_path, base, monkeypatch):
    directory = tmp_path / "run"
    with dying(monkeypatch, after=0):
        run(directory, base, keep="last")
    with pytest.raises(
        CheckpointError, match=r"evaluation so far, of step 4, [\s\S]*step 5 [\s\S]*--keep last"
    ):
        run(directory, base, resume=True)
    metrics = directory / "metrics.jsonl"
    metrics.rename(tmp_path / "metrics.jsonl")
    for changes in ({}, {"keep": "last"}):
        with pytest.raises(CheckpointError, match=r"evaluations in metrics\.jsonl"):
            run(directory, base, resume=True, **changes)
    (tmp_path / "metrics.jsonl").rename(metrics)
    assert run(directory, base, resume=True, keep="last", patience=None)[0] == 8
    with dying(monkeypatch, after=4):
        run(tmp_path / "damaged", base)
    os.truncate(tmp_path / "damaged" / "checkpoints" / "4" / "run" / "metadata", 0)
    with pytest.raises(CheckpointError, match=r"The best checkpoint[\s\S]*step 4: [\s\S]*--keep last"):
        run(tmp_path / "damaged", base, resume=True)
    assert run(tmp_path / "damaged", base, resume=True, keep="last")[0] == 7


@pytest.mark.parametrize("changes", [{"patience": None}, {"keep": "last"}], ids=["keep", "patience"])
def test_without_held_out_data_it_is_refused(tmp_path, base, changes):
    with pytest.raises(DataError, match="held-out data"):
        HyLoRADATrainer(base, texts(), None, settings(tmp_path / "run", **SETTINGS | changes))
    assert not (tmp_path / "run").exists()
