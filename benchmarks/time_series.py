"""What is the temporal encoder worth? Small models of real series, adapted with and without the hours.

    python benchmarks/time_series.py

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
import math
import os
import sys
from pathlib import Path
from typing import Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

# Asked when JAX is imported: programs of a second and less are many here, and each seed needs them again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "hylorada" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import tyro

from benchmarks import command
from benchmarks.series.baselines import BASELINES, error_of, frequencies_loss
from benchmarks.series.data import require_statsmodels, statsmodels_version
from benchmarks.series.entry import Entry, Program, bases_of
from benchmarks.series.report import plot, table
from benchmarks.series.setup import BASE, METHODS, SETTINGS, Budget, Setting, prepared_of
from benchmarks.series.tokens import Prepared
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.models.causal_lm import CausalLM

Record = dict[str, Any]
NAME = "time-series"
DEFAULTS = Budget()


def main(budget: tyro.conf.OmitArgPrefixes[Budget] = DEFAULTS, *, output: Path = Path("runs")) -> None:
    """Adapt small models to real series, with the hours and without, and print the table.

    Args:
        budget: how much is computed.
        output: directory of time-series.json and time-series.png.
    """

    refuse_unusable(output)
    found = run(budget)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{NAME}.json", found)
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
        ConfigError: statsmodels is not installed.
        NonFiniteError: a loss became NaN or infinite.
    """
    require_statsmodels()
    from parity_tests.environment import environment

    recorded: Record = {
        "command": command.started(),
        "environment": environment() | {"statsmodels": statsmodels_version()},
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
            bases[setting.series] = bases_of(budget, setting.series)
        prepared = prepared_of(setting, budget.bins)
        recorded["series"][name] = _described(setting, prepared)
        recorded["baselines"][name] = {
            label: {"mae": error_of(prepared, predict(prepared), "test")}
            for label, predict in BASELINES.items()
        }
        frequencies = math.exp(frequencies_loss(prepared, "test"))
        recorded["baselines"][name]["frequencies"] = {"perplexity": frequencies}
        for label, method in (BASE, None), *METHODS.items():
            if method is not None and method.irregular_only and setting.kept == 1:
                continue
            print(f"{setting.label}: {label} …", flush=True)
            entry = Entry(budget, setting, prepared, method, bases[setting.series], programs)
            recorded["runs"] += [{"setting": name, "method": label} | found for found in entry.runs()]
    return recorded


def _described(setting: Setting, prepared: Prepared) -> Record:
    begins = {part: str(prepared.series.times[1:][start]) for part, (start, _) in prepared.parts.items()}
    return {
        **setting._asdict(),
        "unit": prepared.series.unit,
        "changes": prepared.series.changes,
        "quantiser": prepared.quantiser._asdict(),
        "values": {part: stop - start for part, (start, stop) in prepared.parts.items()},
        "begins": begins,
    }


if __name__ == "__main__":
    command.run(main)
