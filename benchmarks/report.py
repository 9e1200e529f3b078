"""Tables and plots of a benchmark's runs, and a page's table from them.

    python benchmarks/report.py benchmarks/results/wikitext-2 --page docs/results.md

Writes table.md, loss.png, by_place.png and parameters.png beside the runs. In the page the table takes the
place of what stands between `<!-- results:NAME -->` and `<!-- end -->`. With --rate, all that is compared has
one learning rate, and table-rate<RATE>.md is written, alone. Of several budgets the largest is shown, or that
of --steps; all of them are compared by benchmarks/budgets.py.
"""

from __future__ import annotations

import itertools
import re
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import run
from benchmarks.rows import Record, Row, mean, read
from hylorada_jax.errors import ConfigError
from hylorada_jax.io.files import write_figure, write_whole
from hylorada_jax.io.reading import read_bounded
from hylorada_jax.terminal import show

# Two columns of the table: the times of a machine that has other work say nothing of the methods.
_TIMES = (("step, s", "seconds_per_step", 1.0, 2), ("tokens/s", "tokens_per_second", 1.0, 0))
_MEMORY = ("memory, MB", "program_bytes", 1e-6, 0)
_QUIET = 1.5  # processes per core; the run itself is about one for each


def main(
    directory: Path,
    /,
    *,
    page: Path | None = None,
    against: str | None = None,
    rate: float | None = None,
    steps: int | None = None,
) -> None:
    """Print the table of a benchmark, and draw its plots.

    Args:
        directory: of the runs, as run_benchmark.py wrote them.
        page: a Markdown file whose table is replaced.
        against: a method; the table also says by how much the others differ from it, seed by seed.
        rate: take the runs with this learning rate, in place of each method's own.
        steps: take the runs of this budget [the largest].
    """
    rows = read(directory, rate, steps)
    text = table(rows, against=against)
    show(text)
    write_whole(directory / ("table.md" if rate is None else f"table-rate{rate:g}.md"), text.encode())
    if rate is None:
        plot(rows, directory)
    fill_page(page, directory.name, text)


def table(rows: Sequence[Row], *, against: str | None = None) -> str:
    """The table as Markdown, with what it was measured on.

    Args:
        rows: from :func:`read`.
        against: the label that differences are taken to, seed by seed; None for no such column.
    """
    labels = {row.label: row for row in rows}
    if against is not None and against not in labels:
        raise ConfigError(
            f"A method of the table is one of {', '.join(labels)}.", repr(against), "Choose one."
        )
    placed, other, probed = (
        all(name in run["result"] for row in rows for run in row.runs)
        for name in ("lim_perplexity", "other_perplexity", "retrieval")
    )
    searched = list(dict.fromkeys(name for row in rows for name in row.point if name != "learning_rate"))
    heads = ["method", "parameters", "rate", *searched, "PPL"]
    heads += [f"PPL − {against}"] if against is not None else []
    heads += (["LiM PPL", "middle / ends"] if placed else []) + (["other PPL"] if other else [])
    heads += ["found"] if probed else []
    costs = [*(_TIMES if _timed(rows) else ()), _MEMORY]
    heads += [head for head, *_ in costs]
    lines = [heads]
    seeds = most_seeds(rows)
    for row in rows:
        if not row.runs:
            chosen = [str(row.point.get(name, "")) for name in searched]
            blank = [""] * (len(heads) - 4 - len(searched))
            lines.append([row.label, "", f"{row.rate:g}", *chosen, "did not end", *blank])
            continue
        trained = row.trained
        cells = [
            f"{row.label}{missing(row, seeds)}",
            f"{row.runs[0]['result']['parameters']:,}",
            f"{row.rate:g}" if trained else "",
            *(str(row.point.get(name, "")) for name in searched),
            plus_minus(row.values("perplexity"), 2),
            *([_difference(row, labels[against])] if against is not None else []),
            *(_places(row) if placed else []),
            *([plus_minus(row.values("other_perplexity"), 2)] if other else []),
            *([plus_minus([mean(found) for found in row.values("retrieval")], 2)] if probed else []),  # type: ignore[arg-type]
            *(
                f"{scale * statistics.median(row.values(name)):,.{digits}f}" if trained else ""
                for _, name, scale, digits in costs
            ),
        ]
        lines.append(cells)
    return f"{markdown(lines)}\n\n{caption(rows)}\n"


def missing(row: Row, seeds: int) -> str:
    """What of a row's runs is not there, in brackets; empty where there are all."""
    short = f"{len(row.runs)} of {seeds} seeds" if row.trained and len(row.runs) < seeds else ""
    lost = f"{row.failed} did not end" if row.failed else ""
    notes = ", ".join(note for note in (short, lost) if note)
    return f" ({notes})" if notes else ""


def _places(row: Row) -> list[str]:
    """LiM PPL, and the middle's perplexity by the ends'."""
    ratios = [a / b for a, b in zip(row.values("lim_middle"), row.values("lim_ends"), strict=True)]
    return [plus_minus(row.values("lim_perplexity"), 2), plus_minus(ratios, 3)]


def caption(rows: Sequence[Row]) -> str:
    """Where the numbers of the table come from, in words."""
    times = "step, tokens/s: medians; " if _timed(rows) else ""
    measured = f"{times}memory: of the compiled step.".capitalize()
    return f"{origin(rows, places=True)} {measured} {measured_on([run for row in rows for run in row.runs])}"


def _timed(rows: Sequence[Row]) -> bool:
    """The times of the runs can be compared: they are of one device without other work."""
    runs = [run for row in rows if row.trained for run in row.runs]
    quiet = all(run["result"]["load_per_core"] <= _QUIET for run in runs)
    return quiet and len({device(run["environment"]) for run in runs}) == 1


def origin(rows: Sequence[Row], *, places: bool = False, seeds: int | None = None) -> str:
    """What was trained on and measured, in words.

    Args:
        rows: of the table; of the largest budget where it shows several.
        places: it has the perplexity by place.
        seeds: of a method, at most; None: as these rows have them.
    """
    ended = [row.runs[0] for row in rows if row.runs]
    record = max(ended, key=lambda record: record["settings"]["steps"])  # the base has none
    settings, tokens, result = record["settings"], record["settings"]["tokens"], record["result"]
    scored = f"PPL of {result['scored_tokens']:,}"
    if places and "lim_sequences" in result:
        scored += f", LiM PPL of {result['lim_sequences'] * settings['seq_len']:,}"
    test = settings["test_data"] or "the other half of what was held out"
    other = f"; other PPL, of the held-out part of {result['other']['data']}" if "other" in result else ""
    part = "" if settings["train_tokens"] is None else f"about {settings['train_tokens']:,} of "
    return (
        f"{settings['model']}, adapted on {settings['train_data']} ({part}{tokens['train']:,} tokens) in "
        f"{settings['steps']} steps of {settings['batch_size']} × {settings['seq_len']} tokens, reported on "
        f"{test} in windows of {settings['seq_len']}: {scored} of its {tokens['test']:,} tokens{other}. "
        f"{over_seeds(seeds or most_seeds(rows))}, not over other text; {_rates(rows)}."
    )


def over_seeds(seeds: int) -> str:
    """What the numbers are means of, in words."""
    return f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "Of one seed"


def measured_on(runs: Sequence[Record]) -> str:
    """Of what devices and commits the runs are, in words."""
    devices = " and ".join(sorted({device(run["environment"]) for run in runs}))
    commits = sorted({str(run["environment"]["commit"]) for run in runs})
    return f"On {devices}. Commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def _rates(rows: Sequence[Row]) -> str:
    """How the settings were come by, in words."""
    trained = [row for row in rows if row.trained]
    alone = all(list(row.point) == ["learning_rate"] for row in trained)
    if alone and all(row.tried == 1 for row in trained):
        rates = {row.rate for row in trained}
        return f"all with the learning rate {min(rates):g}" if len(rates) == 1 else "the rates as given"
    usual = statistics.mode(row.tried for row in trained)
    others = "".join(f", {row.label} of {row.tried}" for row in trained if row.tried != usual)
    chosen, many = ("learning rate that was", "rates") if alone else ("settings that were", "combinations")
    return f"each method with the {chosen} best for it on held-out training data, of {usual} {many}{others}"


def markdown(lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table of lines of cells, its head the first, with columns of words and then of numbers."""
    head, *body = lines
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def device(environment: Record) -> str:
    """What a record was measured on."""
    return environment["cpu"] if environment["platform"] == "cpu" else environment["device"]


def most_seeds(rows: Sequence[Row]) -> int:
    """The seeds of the row that has the most."""
    return max(len(row.runs) for row in rows)


def plus_minus(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, in so many digits; of one value, it alone."""
    text = f"{statistics.mean(values):,.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def among(rate: float, rates: Collection[float]) -> str:
    """A learning rate, marked where it is the first or the last of those that were tried."""
    return f"{rate:g}" + " †" * (len(rates) > 1 and rate in (min(rates), max(rates)))


def ends(table: str) -> str:
    """What :func:`among` marks, in words; empty of a table without such rates."""
    words = " †: the smallest or the largest rate that was tried; a better one may lie beyond."
    return words if "†" in table else ""


def _difference(row: Row, other: Row) -> str:
    """By how much a method's perplexity differs from another's of the same seed."""
    if row is other:
        return ""
    ours, theirs = ({r["settings"]["seed"]: r["result"]["perplexity"] for r in x.runs} for x in (row, other))
    if not row.trained:  # has no seed
        ours = dict.fromkeys(theirs, row.values("perplexity")[0])
    if not other.trained:
        theirs = dict.fromkeys(ours, other.values("perplexity")[0])
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return plus_minus(differences, 2) if differences else ""


def check_page(page: Path | None, name: str) -> None:
    """Refuses a page that has no place for a table.

    Args:
        page: a Markdown file; None for none.
        name: of the table.

    Raises:
        ConfigError: there is no such file, or it has no place for this table.
    """
    if page is not None:
        _filled(page, name, "")


def fill_page(page: Path | None, name: str, table: str) -> None:
    """Puts a table into a page that was checked, in place of the one that is there."""
    if page is not None:
        write_whole(page, _filled(page, name, table))


def _filled(page: Path, name: str, table: str) -> bytes:
    rule = "A page must be a Markdown file."
    return replaced(read_bounded(page, rule, ConfigError, "Check its path.").decode(), name, table).encode()


def replaced(text: str, name: str, table: str) -> str:
    """A Markdown text with another table.

    Args:
        text: has ``<!-- results:NAME -->`` and then ``<!-- end -->``.
        name: which of its tables.
        table: the new one.

    Raises:
        ConfigError: the text has no place for this table.
    """
    start, end = f"<!-- results:{name} -->", "<!-- end -->"
    found = re.search(f"{re.escape(start)}.*?{re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise ConfigError(
            f"The text must have {start} and {end}.", "neither", "Put them where the table goes."
        )
    return f"{text[: found.start()]}{start}\n{table}{end}{text[found.end() :]}"


def plot(rows: Sequence[Row], directory: Path) -> None:
    """Draws the losses over the steps, the perplexity by place, and the perplexity over the parameters.

    Args:
        rows: from :func:`read`.
        directory: of loss.png, by_place.png and parameters.png.
    """
    rows = [row for row in rows if row.runs]
    style = styles([row.label for row in rows])
    trained = [row for row in rows if row.trained]

    def losses(axes: Any) -> None:
        for row in trained:
            curves = [_running_mean(values) for values in row.values("losses")]  # type: ignore[arg-type]
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axes.plot(range(1, len(means) + 1), means, **style[row.label] | {"marker": ""})
        axes.set(xlabel="optimizer step", ylabel="training loss, running mean (nats per token)")
        axes.legend()

    def by_place(axes: Any) -> None:
        for row in rows:
            buckets = zip(*row.values("lim_buckets"), strict=True)
            axes.plot(range(1, 11), [statistics.mean(b) for b in buckets], **style[row.label])
        axes.set(yscale="log", xlabel="tenth of the sequence", ylabel="perplexity")
        axes.legend()

    def parameters(axes: Any) -> None:
        for row in trained:
            values = row.values("perplexity")
            spread = statistics.stdev(values) if len(values) > 1 else 0
            count = row.runs[0]["result"]["parameters"]
            point = style[row.label] | {"linestyle": ""}
            axes.errorbar(count, statistics.mean(values), yerr=spread, capsize=3, **point)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel="test perplexity")
        axes.legend()

    draw(directory / "loss.png", losses)
    if all("lim_buckets" in run["result"] for row in rows for run in row.runs):
        draw(directory / "by_place.png", by_place)
    draw(directory / "parameters.png", parameters)


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method looks, in all of the plots."""
    from cycler import cycler
    from matplotlib import rcParams  # imported late: it takes a second

    # There are ten colours, and tables of more methods.
    forms = cycler(linestyle=["-", "--"], marker=["o", "s"])
    looks = itertools.cycle(forms * rcParams["axes.prop_cycle"])
    return {label: {"label": label, **next(looks)} for label in labels}


def draw(path: Path, fill: Callable[[Any], None]) -> None:
    """Writes a figure of one pair of axes, which a function fills."""
    from matplotlib.figure import Figure  # imported late: it takes a second

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    fill(axes)
    axes.grid(alpha=0.3)
    write_figure(path, figure)


def _running_mean(values: Sequence[float], width: int = 8) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    run(main)
