"""The runs of a benchmark, and the rows of the tables that they make."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiment import BASE, dev_loss
from benchmarks.kept import Record
from hylorada_jax.errors import CheckpointError


class Row(NamedTuple):
    """What the table says of one method: its runs with one value of each setting.

    Attributes:
        label: the method's.
        point: the settings that were searched, with the values of these runs.
        runs: those with measures of the test data, in the order of the seeds.
        failed: how many did not end.
        tried: how many combinations of settings it was tried with, at the smallest budget.
        left: how many of them at this budget.
    """

    label: str
    point: dict[str, Any]
    runs: list[Record]
    failed: int
    tried: int
    left: int

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.point["learning_rate"]

    def values(self, name: str) -> list[float]:
        """A result of every run, in the order of the seeds."""
        return [run["result"][name] for run in self.runs]

    @property
    def trained(self) -> bool:
        """It is no base, or none of its runs ended."""
        return not (self.runs and _is_base(self.runs[0]))


def records(directory: Path) -> list[Record]:
    """The runs of a benchmark, in the order of the seeds.

    Raises:
        CheckpointError: there are none, another file is among them, or they are not of one experiment.
    """
    files = sorted(directory.glob("*.json"))
    found = [json.loads(file.read_text("utf-8")) for file in files]
    if not found:
        raise CheckpointError(
            "A benchmark must have runs.", f"none in {directory}", "Run run_benchmark.py first."
        )
    for file, record in zip(files, found, strict=True):
        if not isinstance(record, dict) or "kind" not in record.get("settings", {}):
            rule = "The directory of a benchmark has the records of run_benchmark.py alone."
            raise CheckpointError(rule, file, "Give the directory that bears the experiment's name.")
    shared = {json.dumps(_shared(record), sort_keys=True) for record in found}
    if len(shared) > 1:
        raise CheckpointError(
            "The runs of a table have the same data.", f"{len(shared)} kinds", "Separate them."
        )
    return sorted(found, key=lambda record: record["settings"]["seed"])


def budgets(runs: Sequence[Record]) -> list[int]:
    """The steps of a benchmark's runs, the fewest first."""
    return sorted({run["settings"]["steps"] for run in runs if not _is_base(run)})


def read(directory: Path, rate: float | None = None, steps: int | None = None) -> list[Row]:
    """The rows of a benchmark, the least perplexity last, but for what did not end.

    Args:
        directory: of the runs.
        rate: of the runs to take. None takes those of the settings with the least held-out loss on the seed
            that all were tried with, for each method.
        steps: the budget; None takes the largest.

    Raises:
        CheckpointError: there are no runs, or they are not of one experiment; or none is of this rate and
            budget.
    """
    found = records(directory)
    chosen = rate is not None or steps is not None
    if steps is None:
        steps = max(budgets(found), default=0)
    by_label: dict[str, list[Record]] = {}
    for record in found:
        by_label.setdefault(record["settings"]["label"], []).append(record)
    rows = [row for label, runs in by_label.items() if (row := _row(label, runs, steps, rate))]
    if not any(row.runs and (row.trained or not chosen) for row in rows):
        received = f"{steps} steps" if rate is None else f"{steps} steps, learning rate {rate:g}"
        rates = sorted({record["settings"]["learning_rate"] for record in found if not _is_base(record)})
        raise CheckpointError(
            "Some run must have ended.",
            f"none of {received} in {directory}",
            f"There are budgets of {_listed(budgets(found))} steps, and rates of {_listed(rates)}.",
        )
    # Infinite where none ended: those come first.
    return sorted(rows, key=lambda row: -mean(row.values("perplexity")))


def _row(label: str, runs: list[Record], steps: int, rate: float | None) -> Row | None:
    """That of a method's runs, in the order of their seeds; None where none has the budget and the rate."""
    if rate is not None and not _is_base(runs[0]):
        runs = [run for run in runs if run["settings"]["learning_rate"] == rate]
    least = min(budgets(runs), default=0)
    tried = _grid([run for run in runs if run["settings"]["steps"] == least])
    runs = [run for run in runs if _is_base(run) or run["settings"]["steps"] == steps]
    if not runs:
        return None
    left = _grid(runs)
    best = point(min(left, key=dev_loss))
    own = [run for run in runs if point(run) == best]
    failed = sum("dev_loss" not in run["result"] for run in own)
    return Row(label, best, [run for run in own if is_measured(run)], failed, len(tried), len(left))


def _grid(runs: list[Record]) -> list[Record]:
    """Those of the first seed, which settings are searched with."""
    return [run for run in runs if run["settings"]["seed"] == runs[0]["settings"]["seed"]]


def _is_base(record: Record) -> bool:
    return record["settings"]["kind"] == BASE


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "none"


def is_measured(record: Record) -> bool:
    """The test data was measured: the run ended, and was not only tried in a search."""
    return "perplexity" in record["result"]


def point(record: Record) -> dict[str, Any]:
    """The values of a run for the settings that were searched."""
    settings = record["settings"]  # at first the learning rate alone was searched
    return {"learning_rate": settings["learning_rate"], **settings.get("point", {})}


def _shared(record: Record) -> Record:
    # Records from before the start of lora_A was a setting of the config have "kaiming".
    own = (
        "label", "learning_rate", "point", "steps", "seed", "order", "kind", "config", "kaiming", "structure",
    )  # fmt: skip
    return {key: value for key, value in record["settings"].items() if key not in own}


def mean(values: Sequence[float]) -> float:
    """The mean; infinite of no values."""
    return statistics.mean(values) if values else math.inf
