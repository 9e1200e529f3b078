"""The settings of HyLoRADA that learn a text best: a search with Optuna.

    python benchmarks/optimize_hylorada.py --n_trials 15 --epochs 2

TPE proposes, trials that fall behind the median are stopped at one of four evaluations on held-out text. The
study is kept in <output>/study.db: after a kill the same command goes on, and several at once share the
trials. At the end <output> has best.json for `hylorada finetune --config`, all trials in trials.json,
history.png and importance.png.

A step is compiled once for each rank: every other setting that is searched is a number that it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import run, started
from benchmarks.experiment import INSTALL, differences
from benchmarks.report import draw
from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.data.corpus import PYTHON_STDLIB, load_documents
from hylorada_jax.errors import CheckpointError, ConfigError, HyLoRADAError, near, require_packages
from hylorada_jax.exact import fraction
from hylorada_jax.io.files import kind_of, refuse_unusable, write_json, write_whole

if TYPE_CHECKING:
    import optuna

    from hylorada_jax.evaluation.perplexity import PerplexityEvaluator
    from hylorada_jax.model import HyLoRADAModel

RANKS = (4, 8, 12, 16)
EVALUATIONS = 4
HEARTBEAT = 60  # seconds


def main(
    *,
    n_trials: int = 15,
    epochs: float = 2.0,
    method: str = "hylorada",
    model: str = "smollm2-135m",
    data: str = PYTHON_STDLIB,
    train_tokens: int = 16384,
    dev_tokens: int = 4096,
    batch_size: int = 2,
    seq_len: int = 256,
    seed: int = 0,
    output: Path = Path("runs/search"),
) -> None:
    """Search the settings of a method: rank, α, rates, gates and dropout.

    Args:
        n_trials: trials of the study, over all processes and all times it was started.
        epochs: passes over the training tokens, in each trial.
        method: one of the HyLoRADA methods.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        data: python-stdlib (the embedded corpus), a file, a glob, or a Hub dataset; 5 % is held out.
        train_tokens: train on about this many tokens, spread evenly.
        dev_tokens: judge a trial by about this many held-out tokens.
        batch_size: rows per step.
        seq_len: tokens per row.
        seed: of the proposals, the adapters' start and the order of the data.
        output: directory of the study.
    """
    settings = {name: value for name, value in locals().items() if name not in ("n_trials", "output")}
    if n_trials < 1:
        raise ConfigError("A study must have a trial.", f"n_trials {n_trials}", "Give at least 1.")
    search = Search(output, settings)
    search.run(n_trials)
    search.report(f"hylorada finetune --model {model} --data {data} --output runs/best")


def suggest(trial: optuna.trial.BaseTrial) -> dict[str, float]:
    """A trial's settings: the ranges are those that the method's authors searched."""
    return {
        "rank": trial.suggest_categorical("rank", RANKS),
        "alpha_ratio": trial.suggest_float("alpha_ratio", 1.5, 3.0),
        "lora_plus_ratio": trial.suggest_float("lora_plus_ratio", 5.0, 20.0),
        "gate_init": trial.suggest_float("gate_init", -1.0, 1.0),
        "residual_init": trial.suggest_float("residual_init", 0.0, 0.5),
        "dropout": trial.suggest_float("dropout", 0.0, 0.1),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 5e-4, log=True),
    }


def config_of(method: str, chosen: dict[str, float]) -> HyLoRADAConfig:
    """The adapter of a trial's settings."""
    return HyLoRADAConfig(
        method=method,
        lora_rank=int(chosen["rank"]),
        lora_alpha=chosen["alpha_ratio"] * chosen["rank"],
        lora_plus_enabled=True,
        lora_plus_ratio=chosen["lora_plus_ratio"],
        gate_init=chosen["gate_init"],
        residual_init=chosen["residual_init"],
        lora_dropout=max(chosen["dropout"], 1e-6),  # without any it would be another program
    )


class Search:
    """A study, and what its trials share; what can be wrong is reported here, before a model is loaded.

    Args:
        output: directory of the study.
        settings: of :func:`main`; a study that is there must have the same.

    Raises:
        ConfigError: Optuna is not installed, the method has nothing to search, or a size is out of range.
        DataError: the data is missing or too short.
        ModelError: the model is not found or has no tokenizer.
        CheckpointError: the study that is there has other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        refuse_unusable(output)
        searched = [name for name, implied in METHODS.items() if implied.get("use_hylorada")]
        if settings["method"] not in searched:
            rule = "The settings that are searched are HyLoRADA's."
            raise ConfigError(rule, f"method {settings['method']!r}", near(settings["method"], searched))
        require_packages("The search needs Optuna.", ["optuna"], INSTALL)
        from benchmarks.trial import Runner, require_row, training_rows
        from hylorada_jax.data.document import digest
        from hylorada_jax.data.packing import check_windows
        from hylorada_jax.data.tokenization import tokenize
        from hylorada_jax.models.base_model import require_segments
        from hylorada_jax.models.loading import empty_model
        from hylorada_jax.models.positions import check_range
        from hylorada_jax.models.tokenizer import load_tokenizer
        from hylorada_jax.models.wrapped import as_base
        from hylorada_jax.surgery.fit import fit

        check_windows(settings["seq_len"], tokens=settings["dev_tokens"])
        if not 0 < settings["epochs"] < math.inf:
            raise ConfigError("epochs must be positive.", settings["epochs"], "Correct it.")
        empty = as_base(empty_model(settings["model"]))
        require_segments(empty, empty.name)
        check_range((settings["batch_size"], settings["seq_len"]), limit=empty.position_limit)
        fit(empty, HyLoRADAConfig(method=settings["method"]))
        tokenizer = load_tokenizer(settings["model"])
        train, self._dev = (
            tokenize(load_documents(settings["data"], split), tokenizer) for split in ("train", "eval")
        )
        require_row("training", train, settings["seq_len"])
        require_row("held-out", self._dev, settings["seq_len"])
        rows = training_rows(train, settings["seq_len"], settings["train_tokens"])
        self._steps = max(
            EVALUATIONS, math.ceil(fraction(settings["epochs"]) * len(rows) / settings["batch_size"])
        )
        self._settings = settings | {"sha256": [digest(train), digest(self._dev)]}
        self._output, self._study = output, _study(output, self._settings)
        self._base: Any = None
        # One for each rank, whose programs serve all its trials.
        self._runners: defaultdict[int, Runner] = defaultdict(lambda: Runner(rows))
        self._evaluators: dict[int, Any] = {}

    def run(self, n_trials: int) -> None:
        """Does the trials that the study lacks.

        Args:
            n_trials: how many it has at the end, those included that were stopped early.
        """
        import optuna
        from optuna.trial import TrialState

        done = (TrialState.COMPLETE, TrialState.PRUNED)
        if len(self._study.get_trials(states=done)) < n_trials:
            enough = optuna.study.MaxTrialsCallback(n_trials, states=done)
            self._study.optimize(self._objective, callbacks=[enough])

    def _objective(self, trial: optuna.Trial) -> float:
        import optuna

        from benchmarks.trainables import Adapted
        from hylorada_jax.errors import NonFiniteError
        from hylorada_jax.models.loading import load_model
        from hylorada_jax.training.config import TrainingConfig

        settings, chosen = self._settings, suggest(trial)
        if self._base is None:
            self._base = load_model(settings["model"])
        adapted = Adapted(self._base, config_of(settings["method"], chosen))
        evaluate = self._evaluator(adapted.model)
        training = TrainingConfig(
            output=self._output,
            steps=self._steps,
            batch_size=settings["batch_size"],
            seq_len=settings["seq_len"],
            learning_rate=chosen["learning_rate"],
            seed=settings["seed"],
        )
        losses: list[float] = []

        def judge(step: int, adapters: Any) -> None:
            if step * EVALUATIONS // self._steps == len(losses):
                return
            losses.append(evaluate(adapters, adapted.model.frozen, progress=False).loss)
            trial.report(losses[-1], step)
            if step < self._steps and trial.should_prune():
                raise optuna.TrialPruned

        try:
            self._runners[int(chosen["rank"])].train(adapted, training, on_step=judge)
        except NonFiniteError as error:
            raise optuna.TrialPruned(str(error)) from error
        return losses[-1]

    def _evaluator(self, model: HyLoRADAModel) -> PerplexityEvaluator:
        """Of the held-out loss; the first model of a rank compiles it for all."""
        from hylorada_jax.evaluation.perplexity import PerplexityEvaluator

        settings = self._settings
        if (rank := model.config.lora_rank) not in self._evaluators:
            self._evaluators[rank] = PerplexityEvaluator(
                model,
                self._dev,
                seq_len=settings["seq_len"],
                stride=settings["seq_len"],
                batch_size=settings["batch_size"],
                max_tokens=settings["dev_tokens"],
            )
        return self._evaluators[rank]

    def report(self, command: str) -> None:
        """Writes best.json, trials.json and the plots.

        Args:
            command: that trains with the best settings, for the user to go on with.

        Raises:
            HyLoRADAError: no trial ended.
        """
        import optuna

        from parity_tests.environment import environment

        if not self._study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            rule = "One trial of a study must end with a finite loss, to be the best."
            raise HyLoRADAError(rule, f"{len(self._study.trials)} that did not", "Raise --n-trials.")
        best = self._study.best_trial
        path = self._output / "best.json"
        write_whole(path, config_of(self._settings["method"], best.params).to_json().encode())
        record = {
            "command": started(),
            "settings": self._settings,
            "environment": environment(),
            "trials": [
                {"state": trial.state.name, "chosen": trial.params, "losses": trial.intermediate_values}
                for trial in self._study.trials
            ],
        }
        write_json(self._output / "trials.json", record)
        draw(self._output / "history.png", lambda axes: _history(axes, self._study))
        draw(self._output / "importance.png", lambda axes: _importance(axes, self._study))
        print(f"best of {len(self._study.trials)} trials: held-out loss {best.value:.4f}")
        print(f"{command} --config {path} --learning-rate {best.params['learning_rate']:.3g}")


def _study(output: Path, settings: dict[str, Any]) -> optuna.Study:
    """The study of a directory, new or as it was left."""
    import optuna

    output.mkdir(parents=True, exist_ok=True)
    file = output / "study.db"
    if kind_of(file) not in (None, "file"):  # SQLite would write where a link leads
        raise CheckpointError("A study is a file.", file, "Choose another --output.")
    with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
        # A trial that was killed with its process stops beating, and is then no longer taken for under way.
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}", heartbeat_interval=HEARTBEAT)
    study = optuna.create_study(
        storage=storage,
        study_name="hylorada",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(),
    )
    if (theirs := study.user_attrs.get("settings")) is None:
        study.set_user_attr("settings", settings)
    elif changed := differences(theirs, settings):
        raise CheckpointError(
            "A study goes on with the settings that it began with.",
            f"{file}: {changed}",
            "Choose another --output, or remove the study.",
        )
    # A process that joins others must not propose what they do.
    seed = settings["seed"] if not study.trials else None
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    return study


def _history(axes: Any, study: optuna.Study) -> None:
    """Every trial's last held-out loss, and the best so far."""
    from optuna.trial import TrialState

    def last(state: TrialState) -> list[tuple[int, float]]:
        trials = study.get_trials(states=(state,))
        return [(t.number, t.intermediate_values[t.last_step]) for t in trials if t.last_step is not None]

    whole, stopped = last(TrialState.COMPLETE), last(TrialState.PRUNED)
    axes.plot(*zip(*whole, strict=True), "o", label="to the end")
    if stopped:
        axes.plot(*zip(*stopped, strict=True), "x", color="gray", label="stopped early")
    best = list(itertools.accumulate((loss for _, loss in whole), min))
    axes.step([number for number, _ in whole], best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel="held-out loss (nats per token)")
    axes.legend()


def _importance(axes: Any, study: optuna.Study) -> None:
    """How much each setting decides whether a trial is among the better ones (PED-ANOVA)."""
    import optuna

    found: dict[str, float] = {}
    with contextlib.suppress(ValueError, RuntimeError):  # too few trials to say
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    axes.barh(list(found)[::-1], list(found.values())[::-1])
    axes.set(xlabel="importance", title="" if found else "too few trials to say")


if __name__ == "__main__":
    run(main)
