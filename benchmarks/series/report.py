"""The table and the plot of the runs of time_series.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import among, device, ends, markdown, plus_minus
from benchmarks.series.setup import BASE, METHODS
from hylorada_jax.io.files import write_figure

Record = dict[str, Any]


def chosen(found: Record, setting: str, method: str) -> list[Record]:
    """The runs of a method with its own learning rate, in the order of the seeds.

    Args:
        found: from :func:`benchmarks.time_series.run`.
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
        found: from :func:`benchmarks.time_series.run`.
    """
    against = "hylorada_v1"
    rates = found["settings"]["learning_rates"]
    lines = [
        ["series and context", "method", "parameters", "rate", "PPL", f"PPL − {against}", "MAE"],
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
                    among(runs[0]["rate"], rates) if adapted else "",
                    plus_minus(ours, 2),
                    plus_minus([a - b for a, b in zip(ours, other, strict=True)], 2)
                    if label != against
                    else "",
                    f"{plus_minus([run['mae'] for run in runs], 3)} {series['unit']}",
                ]
            )
    body = markdown(lines, words=2)
    return f"{body}\n\n{caption(found)}{ends(body)}\n"


def caption(found: Record) -> str:
    """Where the numbers come from, in words.

    Args:
        found: from :func:`benchmarks.time_series.run`.
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
        found: from :func:`benchmarks.time_series.run`.
        path: of the image.
    """
    from matplotlib.figure import Figure  # imported late: it takes a second

    columns = len(found["series"])
    figure = Figure(figsize=(3.2 * columns + 1.5, 6), dpi=120, layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False)
    colors = {label: f"C{number}" for number, label in enumerate(METHODS)}
    for column, (name, series) in enumerate(found["series"].items()):
        methods = {label: some for label in METHODS if (some := chosen(found, name, label))}
        for row, measure in enumerate(("perplexity", "mae")):
            axes = panels[row][column]
            for at, (label, some) in enumerate(methods.items()):
                values, color = [run[measure] for run in some], colors[label]
                axes.scatter([at] * len(values), values, s=12, alpha=0.5, color=color)
                axes.scatter([at], [statistics.mean(values)], marker="_", s=300, color=color)
            axes.set_xticks(range(len(methods)), methods if row else [], rotation=90)
            axes.set_xlim(-0.5, len(methods) - 0.5)
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
    write_figure(path, figure)
