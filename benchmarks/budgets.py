"""Every method at each budget, with intervals, and which settings were dropped when.

    python benchmarks/budgets.py benchmarks/results/fair-wikitext-2 --against dora --page docs/choosing.md

Writes beside the runs: budgets.md and budgets.png, the perplexities and their differences, and how many
directions the updates have; search.md, the held-out loss of every combination of settings that was tried; and
held_out.png, that of the best over the steps. In the page budgets.md takes the place of what stands between
`<!-- results:NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import run
from benchmarks.experiment import BASE, dev_loss
from benchmarks.intervals import WORDS, Effect, paired_difference
from benchmarks.report import (
    among,
    check_page,
    draw,
    ends,
    fill_page,
    markdown,
    measured_on,
    missing,
    most_seeds,
    origin,
    plus_minus,
    styles,
)
from benchmarks.rows import Record, Row, budgets, is_measured, point, read, records
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io.files import write_whole
from hylorada_jax.terminal import show


def main(directory: Path, /, *, against: str, page: Path | None = None) -> None:
    """Compare the methods of a benchmark at each of its budgets.

    Args:
        directory: of the runs, as run_benchmark.py wrote them.
        against: the method that the others are compared with, seed by seed and text by text.
        page: a Markdown file whose table is replaced.
    """
    check_page(page, directory.name)
    runs = records(directory)
    measured = [record for record in runs if is_measured(record)]
    if old := [record for record in measured if "passages" not in record["result"]]:
        rule = "The runs must have the losses of each passage."
        raise CheckpointError(rule, f"{len(old)} in {directory} without", "Run the experiment anew.")
    # A search that is under way has budgets with nothing measured yet to compare with.
    of_other = [record for record in measured if record["settings"]["label"] == against]
    if not (compared := budgets(of_other) or budgets(measured)):
        rule = "Methods are compared at the budgets that one was trained with."
        raise CheckpointError(rule, f"{directory}: none was yet", "Let run_benchmark.py go on.")
    found = {steps: read(directory, steps=steps) for steps in compared}
    text = table(found, against) + ranks(found[max(found)])
    show(text)
    write_whole(directory / "budgets.md", text.encode())
    write_whole(directory / "search.md", search(runs).encode())
    plot(found, against, directory)
    fill_page(page, directory.name, text)


def table(found: dict[int, list[Row]], against: str) -> str:
    """The perplexities at each budget, and the differences to one method's, as Markdown.

    Args:
        found: {steps: rows}, of :func:`benchmarks.rows.read`.
        against: a label of theirs.

    Raises:
        ConfigError: there is no such label.
    """
    labels = [row.label for row in found[max(found)]]
    labels += [row.label for rows in found.values() for row in rows if row.label not in labels]
    if against not in labels:
        raise ConfigError(
            f"A method of the table is one of {', '.join(labels)}.", repr(against), "Choose one."
        )
    everything = [row for rows in found.values() for row in rows]
    forgets = all("other_perplexity" in run["result"] for row in everything for run in row.runs)
    heads = ["method"]
    for steps in found:
        heads += [f"PPL, {steps} steps", f"− {against}", *(["other PPL"] if forgets else [])]
    lines, seeds = [heads], most_seeds(everything)

    def mean_of(row: Row | None, name: str) -> str:
        return plus_minus(row.values(name), 2) if row and row.runs else ""

    for label in dict.fromkeys(labels):
        cells = [label]
        for rows in found.values():
            by_label = {row.label: row for row in rows}
            row, other = by_label.get(label), by_label.get(against)
            compared = effect(row, other) if row and other and row is not other else None
            ours = mean_of(row, "perplexity") + (missing(row, seeds) if row else "")
            cells += [ours, compared.text(2) if compared else ""]
            cells += [mean_of(row, "other_perplexity")] if forgets else []
        lines.append(cells)
    note = (
        f"{origin(found[max(found)], seeds=seeds)} {_left(found)}Differences with {WORDS} "
        f"{_texts(everything)}. {measured_on([run for row in everything for run in row.runs])}"
    )
    return f"{markdown(lines)}\n\n{note}\n"


def _left(found: dict[int, list[Row]]) -> str:
    """How many combinations were left to choose from at each budget, in words; nothing of a single budget."""
    if len(found) == 1:
        return ""
    left: dict[str, list[str]] = {}  # labels, by the numbers
    for label in dict.fromkeys(row.label for rows in found.values() for row in rows if row.trained):
        counts = [str(row.left) for rows in found.values() for row in rows if row.label == label]
        left.setdefault(" → ".join(counts), []).append(label)
    parts = [f"{' and '.join(labels)} of {counts}" for counts, labels in left.items()]
    return f"The settings of the longer runs were chosen of what the shorter ones left: {', '.join(parts)}. "


def _texts(rows: Sequence[Row]) -> str:
    """What the errors over texts are of, in words."""
    run = next(run for row in rows for run in row.runs)
    count = len(_losses([run])[1])
    return f"{count} windows of one document" if _is_single(run) else f"{count} documents"


def ranks(rows: Sequence[Row]) -> str:
    """How many directions A and BA have, at the start and at the end, as Markdown; empty where no run says.

    Args:
        rows: of one budget, from :func:`benchmarks.rows.read`.
    """
    lines = [["method", "A, at the start", "A, at the end", "BA, at the end"]]
    for row in rows:
        if found := [run["result"]["effective_ranks"] for run in row.runs if _has_ranks(run)]:
            last = max(found[0], key=int)
            columns = [[each[at][of] for each in found] for at, of in (("0", "A"), (last, "A"), (last, "BA"))]
            lines.append(
                [row.label + missing(row, most_seeds(rows)), *(plus_minus(values, 2) for values in columns)]
            )
    if len(lines) == 1:
        return ""
    note = "Effective ranks (Roy and Vetterli 2007), means over the layers, after the most steps."
    return f"\n{note}\n\n{markdown(lines)}\n"


def _has_ranks(run: Record) -> bool:
    return bool(run["result"].get("effective_ranks", {}).get("0"))  # not in the first records; {} of no A


def effect(row: Row, other: Row) -> Effect | None:
    """By how much a method differs from another on the seeds that both have; None where there is none."""
    seeds = [{run["settings"]["seed"]: run for run in each.runs} for each in (row, other)]
    if not row.trained:  # has no seed
        seeds[0] = dict.fromkeys(seeds[1], row.runs[0])
    if not other.trained:
        seeds[1] = dict.fromkeys(seeds[0], other.runs[0])
    shared = [seed for seed in seeds[0] if seed in seeds[1]]
    if not shared:
        return None
    (ours, tokens), (theirs, _) = (_losses([each[seed] for seed in shared]) for each in seeds)
    return paired_difference(ours, theirs, tokens)


def _losses(runs: Sequence[Record]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Summed losses [runs, documents] and scored tokens [documents]; of one document, of its windows."""
    passages = np.array([run["result"]["passages"] for run in runs], float)  # [runs, passages, 3]
    documents = passages[0, :, 0]
    if _is_single(runs[0]):
        documents = np.arange(len(documents))
    _, at = np.unique(documents, return_inverse=True)
    nll = np.stack([np.bincount(at, losses) for losses in passages[:, :, 1]])
    return nll, np.bincount(at, passages[0, :, 2])


def _is_single(run: Record) -> bool:
    """The test text is one document."""
    return len({number for number, *_ in run["result"]["passages"]}) == 1


def search(runs: Sequence[Record]) -> str:
    """The held-out losses of all settings that were tried, as Markdown: of each method the last ones first.

    A rate is marked where it is the best beside the same other settings, and the first or the last one tried.

    Args:
        runs: of :func:`benchmarks.rows.records`.
    """
    first = min(record["settings"]["seed"] for record in runs if record["settings"]["kind"] != BASE)
    searched = [run for run in runs if run["settings"]["kind"] != BASE and run["settings"]["seed"] == first]
    # By label, by the settings other than the rate, and by the rate: the losses by steps.
    losses: dict[str, dict[str, dict[float, dict[int, float]]]] = {}
    for record in searched:
        own, others = record["settings"], {**point(record)}
        rate = others.pop("learning_rate")
        beside = "".join(f", {name} {value}" for name, value in others.items())
        of_rates = losses.setdefault(own["label"], {}).setdefault(beside, {})
        of_rates.setdefault(rate, {})[own["steps"]] = dev_loss(record)
    parts = []
    for label, by_others in losses.items():
        found = {}
        for beside, of_rates in by_others.items():
            best = min(of_rates, key=lambda rate: _last_loss(of_rates[rate]))
            for rate, by_steps in of_rates.items():
                shown = among(rate, of_rates) if rate == best else f"{rate:g}"
                found[f"learning_rate {shown}{beside}"] = by_steps
        order = sorted(found, key=lambda chosen: _last_loss(found[chosen]))
        steps = budgets(runs)
        lines = [["settings", *(f"{n} steps" for n in steps)]]
        for chosen in order:
            cells = [f"{found[chosen][n]:.4f}" if n in found[chosen] else "" for n in steps]
            lines.append([chosen, *cells])
        parts.append(f"## {label}\n\n{markdown(lines)}")
    tables = "\n\n".join(parts)
    note = "Held-out loss in nats, with the first seed. What has no loss at a budget was dropped before it."
    return f"{note}{ends(tables)}\n\n{tables}\n"


def _last_loss(by_steps: dict[int, float]) -> tuple[int, float]:
    """Sorts the settings that went furthest first, and among them the least loss."""
    last = max(by_steps)
    return -last, by_steps[last]


def plot(found: dict[int, list[Row]], against: str, directory: Path) -> None:
    """Draws the differences over the budgets, and the held-out losses over the steps of the largest.

    Args:
        found: {steps: rows}, of :func:`benchmarks.rows.read`.
        against: the label that differences are taken to.
        directory: of budgets.png and held_out.png.
    """
    rows = [row for row in found[max(found)] if row.runs and row.trained]
    style = styles([row.label for row in rows])

    def differences(axes: Any) -> None:
        for number, label in enumerate(row.label for row in rows):
            at, effects = [], []
            for steps, some in found.items():
                by_label = {row.label: row for row in some}
                if label in by_label and against in by_label:
                    compared = effect(by_label[label], by_label[against])
                    if compared is not None:
                        at.append(steps * 1.03 ** (number - len(rows) / 2))  # side by side
                        effects.append(compared)
            if effects:
                mean, low, high = np.array(effects).T
                axes.errorbar(at, mean, yerr=[mean - low, high - mean], capsize=3, **style[label])
        axes.set(xlabel="optimizer steps", ylabel=f"test perplexity, less that of {against}")
        _at_steps(axes, list(found))

    def held_out(axes: Any) -> None:
        for row in rows:
            curves = [list(curve.values()) for curve in row.values("held_out")]  # type: ignore[attr-defined]
            places = [int(step) for step in row.runs[0]["result"]["held_out"]]
            axes.plot(places, np.mean(curves, axis=0), **style[row.label])
        axes.set(xlabel="optimizer step", ylabel="held-out loss (nats per token)")
        _at_steps(axes, sorted({int(step) for row in rows for step in row.runs[0]["result"]["held_out"]}))

    draw(directory / "budgets.png", differences)
    draw(directory / "held_out.png", held_out)


def _at_steps(axes: Any, steps: list[int]) -> None:
    """Gives the plot its legend, and an axis of steps with these marked."""
    axes.set_xscale("log")
    axes.set_xticks(steps, labels=list(map(str, steps)), minor=False)
    axes.minorticks_off()
    axes.legend()


if __name__ == "__main__":
    run(main)
