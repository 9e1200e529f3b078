"""What is the temporal encoder worth? Small models of real series, adapted with and without the hours.

    python benchmarks/time_series.py --output benchmarks/results

Values become tokens, and predicting the next value is language modelling. For every seed, a small Llama with
random weights is pretrained on other series than the one it is then adapted to, with its weights frozen, by
each method. Every method tries each learning rate with the first seed; the rate with the least loss on the
part between the adaptation's and the test's is its own, and goes on with the other seeds. The test part
decides nothing, and nothing that is fitted, the pretraining and the transformations included, sees a value
from after the part to adapt on.

Settings differ in whether the context shows the season: a short one, one of a year and more, and a series
that half of the times are missing from. Writes time-series.json, with every run, and time-series.png.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

# Asked when JAX is imported: programs of a second and less are many here, and each seed needs them again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "hylorada" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from benchmarks import command
from benchmarks import time_series_data as data
from benchmarks.contestants import Adapted, Full
from benchmarks.experiment import require_each_once
from benchmarks.report import device, markdown, plus_minus
from benchmarks.trial import Runner
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.evaluation.sweep import Sweep
from hylorada_jax.io.files import write_whole
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.packing import Rows

Record = dict[str, Any]
BASE = "base, not adapted"
NAME = "time-series"
_EVALUATED_AT_ONCE = 64  # rows


class Setting(NamedTuple):
    """What is predicted from what.

    Attributes:
        label: how the table calls it.
        series: co2 or elnino.
        context: values that a prediction sees.
        kept: part of the times that are there; others are dropped at random.
    """

    label: str
    series: str
    context: int
    kept: float = 1.0


# Few contexts, for each is a program to compile for every method.
SHORT, LONG = 6, 52
SETTINGS = {
    "co2-short": Setting(f"CO2, {SHORT} weeks", "co2", SHORT),
    "co2-long": Setting(f"CO2, {LONG} weeks", "co2", LONG),
    "co2-irregular": Setting(f"CO2, half of the weeks, {SHORT} values", "co2", SHORT, kept=0.5),
    "elnino-short": Setting(f"El Niño, {SHORT} months", "elnino", SHORT),
    "elnino-long": Setting(f"El Niño, {LONG} months", "elnino", LONG),
}


class Method(NamedTuple):
    """A way to adapt.

    Attributes:
        name: of the method in :class:`HyLoRADAConfig`.
        hours: what the structure encoder is told, as :func:`data.told` has it.
        irregular_only: with regular times it is another row of the table, but for a phase that is learned.
    """

    name: str
    hours: data.Told | None = None
    irregular_only: bool = False


METHODS = {
    "lora": Method("lora"),
    "hylorada_v1": Method("hylorada_v1"),
    "hylorada_v2, not told": Method("hylorada_v2"),
    "hylorada_v2, hours": Method("hylorada_v2", "own"),
    "hylorada_v2, hours of the year": Method("hylorada_v2", "year"),
    "hylorada_v2, hours asked for": Method("hylorada_v2", "asked", irregular_only=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is computed.

    Args:
        settings: of ``SETTINGS``.
        seeds: of the base's weights, of the adapters' start and of the order of the data.
        learning_rates: the grid that each method chooses from, with the first seed.
        pretrain_steps: optimizer steps on the other series.
        pretrain_rate: learning rate of those.
        steps: optimizer steps of an adaptation.
        batch_size: rows per step.
        bins: tokens.
        hidden_size: of the base.
        layers: of the base.
        rank: of the adapters.
        max_grad_norm: to which gradients are clipped. Those of the encoder's periods and frequencies grow
            with the hours, and take their share from all others.

    Raises:
        ConfigError: a value is out of range, or a setting is unknown.
    """

    settings: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    pretrain_steps: int = 600
    pretrain_rate: float = 3e-3
    steps: int = 200
    batch_size: int = 8
    bins: int = 32
    hidden_size: int = 64
    layers: int = 2
    rank: int = 2
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("settings", "seeds", "learning_rates"):
            require_each_once(name, getattr(self, name))
        if unknown := [name for name in self.settings if name not in SETTINGS]:
            raise ConfigError(f"A setting is one of {', '.join(SETTINGS)}", unknown, "Choose of these.")
        for name in ("pretrain_steps", "steps", "batch_size", "layers", "rank", "bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive", getattr(self, name), "Correct it.")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ConfigError(
                "hidden_size must be a multiple of 8: four heads of even width",
                self.hidden_size,
                "Correct it.",
            )


def main(
    budget: tyro.conf.OmitArgPrefixes[Budget] = Budget(), *, output: Path = Path("benchmarks/results")
) -> None:
    """Adapt small models to real series, told the hours and not, and print the table.

    Args:
        budget: how much is computed.
        output: directory of time-series.json and time-series.png.
    """
    found = run(budget)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / f"{NAME}.json", (json.dumps(found, indent=1) + "\n").encode())
    plot(found, output / f"{NAME}.png")
    print(table(found))


def run(budget: Budget) -> Record:
    """The whole experiment.

    Args:
        budget: how much is computed.

    Returns:
        JSON-able: ``environment``, ``command``, ``settings`` (the budget), ``series`` and ``baselines`` of
        every setting, and ``runs``, each of a setting, a method, a rate and a seed.

    Raises:
        DataError: statsmodels is not installed.
        NonFiniteError: a loss became NaN or infinite.
    """
    data.require_statsmodels()
    from parity_tests.environment import environment

    recorded: Record = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment() | {"statsmodels": data.statsmodels_version()},
        "settings": dataclasses.asdict(budget),
        "series": {},
        "baselines": {},
        "runs": [],
    }
    bases: dict[str, list[CausalLM]] = {}
    programs: dict[Any, Program] = {}
    for name in budget.settings:
        setting = SETTINGS[name]
        if setting.series not in bases:
            print(f"pretraining for {setting.series} …", flush=True)
            bases[setting.series] = _bases(budget, setting.series)
        prepared = prepare(setting, budget.bins)
        recorded["series"][name] = _described(setting, prepared)
        recorded["baselines"][name] = {
            label: {"mae": data.error_of(prepared, predict(prepared), "test")}
            for label, predict in data.BASELINES.items()
        }
        frequencies = math.exp(data.frequencies_loss(prepared, "test"))
        recorded["baselines"][name]["frequencies"] = {"perplexity": frequencies}
        for label, method in (BASE, None), *METHODS.items():
            if method is not None and method.irregular_only and setting.kept == 1:
                continue
            print(f"{setting.label}: {label} …", flush=True)
            entry = Entry(budget, setting, prepared, method, bases[setting.series], programs)
            recorded["runs"] += [{"setting": name, "method": label} | found for found in entry.runs()]
    return recorded


def prepare(setting: Setting, bins: int) -> data.Prepared:
    """The tokens of a setting, divided by time.

    Args:
        setting: whose.
        bins: number of tokens.
    """
    series = data.target_series()[setting.series]
    # Divided at the same times, whether values are dropped or not. The seed is part of the data set.
    return data.prepare(data.thinned(series, setting.kept, seed=0), bins, *data.boundaries(series))


def _described(setting: Setting, prepared: data.Prepared) -> Record:
    begins = {part: str(prepared.series.times[1:][start]) for part, (start, _) in prepared.parts.items()}
    return {
        **setting._asdict(),
        "unit": prepared.series.unit,
        "changes": prepared.series.changes,
        "quantiser": prepared.quantiser._asdict(),
        "values": {part: stop - start for part, (start, stop) in prepared.parts.items()},
        "begins": begins,
    }


def _bases(budget: Budget, target: str) -> list[CausalLM]:
    """For each seed a small Llama that knows other series, up to where those of the target are held out."""
    series = data.target_series()
    dev_at, _ = data.boundaries(series.pop(target))
    rows = data.pretraining_rows([*series.values(), *data.other_series()], budget.bins, LONG, dev_at)
    runner, bases = Runner(rows), []
    for seed in budget.seeds:
        full = Full(CausalLM.from_config(_decoder(budget), jax.random.key(seed)))
        training = _training(budget, rows, steps=budget.pretrain_steps, rate=budget.pretrain_rate, seed=seed)
        bases.append(full.trained(runner.train(full, training)[0]))
    return bases


def _decoder(budget: Budget) -> DecoderConfig:
    return DecoderConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": budget.bins,
            "hidden_size": budget.hidden_size,
            "intermediate_size": 2 * budget.hidden_size,
            "num_hidden_layers": budget.layers,
            "num_attention_heads": 4,
            "max_position_embeddings": LONG,
            "tie_word_embeddings": False,
            # HF's 0.02 is made for widths of thousands.
            "initializer_range": budget.hidden_size**-0.5,
        }
    )


def _training(budget: Budget, rows: Rows, *, steps: int, rate: float, seed: int) -> TrainingConfig:
    return TrainingConfig(
        output_dir=".",  # nothing is written
        steps=steps,
        batch_size=budget.batch_size,
        seq_len=rows[0]["input_ids"].size,
        learning_rate=rate,
        max_grad_norm=budget.max_grad_norm,
        seed=seed,
    )


def adapter(method: Method, rank: int, context: int) -> HyLoRADAConfig:
    """What a method trains.

    Args:
        method: which.
        rank: of its update.
        context: from whose middle positions count where no hours are told.
    """
    return HyLoRADAConfig(
        method=method.name,
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        target_modules="all-linear",  # the same layers for every method
        structure_encoder_type="temporal",
        structure_seq_len=context,
    )


class Program(NamedTuple):
    """What is compiled for a method and a context, whatever the series, base, seed and rate.

    Attributes:
        runner: trains; its rows are exchanged.
        sweep: the losses of the last targets of rows, and the means of the tokens predicted there.
    """

    runner: Runner
    sweep: Sweep


def last(hidden: Array, head: Array, batch: Mapping[str, Array]) -> Array:
    """[2, rows]: the losses of each row's last target, and the means of the tokens predicted there."""
    log_p = jax.nn.log_softmax((hidden[:, -1] @ head.T).astype(jnp.float32))
    target = jnp.maximum(batch["targets"][:, -1:], 0)  # rows of padding have none
    mean = jnp.exp(log_p) @ jnp.arange(log_p.shape[-1], dtype=jnp.float32)
    return jnp.stack([-jnp.take_along_axis(log_p, target, -1)[:, 0], mean])


class Entry:
    """A method in a setting.

    Args:
        budget: how much is computed.
        setting: what is predicted from what.
        prepared: its tokens.
        method: what adapts; None measures the bases as they are.
        bases: one for each seed.
        programs: what was compiled before, and is added to.
    """

    def __init__(
        self,
        budget: Budget,
        setting: Setting,
        prepared: data.Prepared,
        method: Method | None,
        bases: list[CausalLM],
        programs: dict[Any, Program],
    ) -> None:
        self._budget, self._prepared = budget, prepared
        hours = None if method is None else method.hours
        self._rows = {part: data.windows(prepared, part, setting.context, hours) for part in prepared.parts}
        config = None if method is None else adapter(method, budget.rank, setting.context)
        self._entrants = [None if config is None else Adapted(base, config) for base in bases]
        self._bases = bases
        key = (config, setting.context, hours is None)
        if key not in programs:
            model = bases[0] if config is None else self._entrants[0].model  # type: ignore[union-attr]
            programs[key] = Program(Runner(self._rows["adapt"]), Sweep(model, last))
        self._program = programs[key]
        self._program.runner.rows = self._rows["adapt"]

    def runs(self) -> list[Record]:
        """Each rate with the first seed, the best of them with the others."""
        seeds = range(len(self._budget.seeds))
        if self._entrants[0] is None:
            return [self._run(at, 0.0) for at in seeds]
        tried = [self._run(0, rate) for rate in self._budget.learning_rates]
        best = min(tried, key=lambda run: run["dev_loss"])["rate"]
        return tried + [self._run(at, best) for at in seeds[1:]]

    def _run(self, at: int, rate: float) -> Record:
        """What one run trained, and its measures."""
        entrant, seed = self._entrants[at], self._budget.seeds[at]
        trained: Record = {"parameters": 0}
        model: Record = {"adapters": {}, "frozen": {"params": self._bases[at].params}}
        if entrant is not None:
            training = _training(
                self._budget, self._rows["adapt"], steps=self._budget.steps, rate=rate, seed=seed
            )
            adapters, found = self._program.runner.train(entrant, training)
            trained = {name: found[name] for name in ("parameters", "losses")}
            model = {"adapters": adapters, "frozen": entrant.frozen}
        dev_loss, _ = self._measure("dev", model)
        loss, error = self._measure("test", model)
        return {
            "rate": rate,
            "seed": seed,
            **trained,
            "dev_loss": dev_loss,
            "loss": loss,
            "perplexity": math.exp(loss),
            "mae": error,
        }

    def _measure(self, part: str, model: Record) -> tuple[float, float]:
        """Mean loss in nats and mean absolute error in the series' unit, each value from a whole context."""
        rows, prepared = self._rows[part], self._prepared
        found = [values for _, values in self._program.sweep(rows, _EVALUATED_AT_ONCE, **model)]
        losses, tokens = np.concatenate(found, axis=1)[:, : len(rows)].astype(np.float64)
        start, stop = prepared.parts[part]  # there is a row for each value of it
        predicted = np.copy(prepared.offset)
        predicted[start:stop] += prepared.quantiser.values(tokens)
        return float(losses.mean()), data.error_of(prepared, predicted, part)


def chosen(found: Record, setting: str, method: str) -> list[Record]:
    """The runs of a method with its own learning rate, in the order of the seeds.

    Args:
        found: from :func:`run`.
        setting: which.
        method: its label.
    """
    runs = [run for run in found["runs"] if (run["setting"], run["method"]) == (setting, method)]
    if not runs:
        return []

    first = [run for run in runs if run["seed"] == found["settings"]["seeds"][0]]
    rate = min(first, key=lambda run: run["dev_loss"])["rate"]
    return [run for run in runs if run["rate"] == rate]


def table(found: Record) -> str:
    """The table as Markdown, with what it was measured on.

    Args:
        found: from :func:`run`.
    """
    against = "hylorada_v1"
    lines = [
        ["series and context", "method", "parameters", "rate", "PPL", f"PPL − {against}", "MAE"],
        ["---", "---", *["---:"] * 5],
    ]
    for name, series in found["series"].items():
        for label, baseline in found["baselines"][name].items():
            error = f"{baseline['mae']:.3f} {series['unit']}" if "mae" in baseline else ""
            perplexity = f"{baseline['perplexity']:.2f}" if "perplexity" in baseline else ""
            lines.append([series["label"], label, "", "", perplexity, "", error])
        other = [run["perplexity"] for run in chosen(found, name, against)]
        for label in (BASE, *METHODS):
            if not (runs := chosen(found, name, label)):
                continue
            ours = [run["perplexity"] for run in runs]
            adapted = label != BASE
            lines.append(
                [
                    series["label"],
                    label,
                    f"{runs[0]['parameters']:,}" if adapted else "",
                    f"{runs[0]['rate']:g}" if adapted else "",
                    plus_minus(ours, 2),
                    plus_minus([a - b for a, b in zip(ours, other, strict=True)], 2)
                    if label != against
                    else "",
                    f"{plus_minus([run['mae'] for run in runs], 3)} {series['unit']}",
                ]
            )
    return f"{markdown(lines)}\n\n{caption(found)}\n"


def caption(found: Record) -> str:
    """Where the numbers come from, in words.

    Args:
        found: from :func:`run`.
    """
    budget, environment = found["settings"], found["environment"]
    return (
        f"A Llama of {budget['layers']} layers and width {budget['hidden_size']}, {budget['bins']} bins as "
        f"tokens, pretrained on other series in {budget['pretrain_steps']} steps and adapted, rank "
        f"{budget['rank']}, in {budget['steps']} steps of {budget['batch_size']} windows. Each value of the "
        f"test part is predicted from a whole context. Mean ± standard deviation of {len(budget['seeds'])} "
        f"seeds, each with a base of its own; differences are taken seed by seed. Each method with the "
        f"learning rate that was best for it, with the first seed, on the part before the test. On "
        f"{device(environment)}, commit {environment['commit']}: `{found['command']}`"
    )


def plot(found: Record, path: Path) -> None:
    """Draws perplexity and error of every method, a column for each setting.

    Args:
        found: from :func:`run`.
        path: of the image.
    """
    from matplotlib.figure import Figure  # imported late: it takes a second

    columns = len(found["series"])
    figure = Figure(figsize=(3.2 * columns + 1.5, 6), dpi=120, layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False)
    for column, (name, series) in enumerate(found["series"].items()):
        for row, measure in enumerate(("perplexity", "mae")):
            axes = panels[row][column]
            for at, label in enumerate(METHODS):
                values = [run[measure] for run in chosen(found, name, label)]
                if values:
                    axes.scatter([at] * len(values), values, s=12, alpha=0.5, color=f"C{at}")
                    axes.scatter([at], [statistics.mean(values)], marker="_", s=300, color=f"C{at}")
            axes.set_xticks(range(len(METHODS)), list(METHODS) if row else [], rotation=90)
            axes.grid(alpha=0.3)
        panels[0][column].set_title(series["label"], fontsize=9)
        for number, (label, baseline) in enumerate(found["baselines"][name].items()):
            for row, measure in enumerate(("perplexity", "mae")):
                if measure in baseline:
                    style = ("-", "--", ":", "-.")[number % 4]
                    panels[row][column].axhline(baseline[measure], color="gray", linestyle=style, label=label)
        panels[1][column].set_ylabel(f"MAE, {series['unit']}")
    panels[0][0].set_ylabel("test perplexity")
    for row in range(2):
        panels[row][0].legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    command.run(main)
