"""What is each method worth? All of them on the same data, tokens and seeds, one file per run.

    python benchmarks/run_benchmark.py --methods lora dora lorada hylorada --epochs 3
    python benchmarks/run_benchmark.py --config benchmarks/experiments/wikitext-2.json --data-dir wikitext-2

Every method is trained with each combination of the grid's settings and the first seed; the one with the
least loss on the held-out part of the training data is its own, and goes on with the other seeds. Of several
budgets (steps) the smallest comes first, and only the best part of a method's combinations goes on to the
next, where it is trained anew: the rates fall over the whole of a run, so a short one is no beginning of a
long one. The test data decides nothing.

Every run is a file in <output>/<name>/, and a benchmark that was killed goes on where it was. Runs that
diverged or found no memory are kept as such; remove such a file, and its run is tried again.
`python benchmarks/report.py` draws tables and plots from there.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import run, started
from benchmarks.experiment import Experiment


def main(
    *,
    config: Path | None = None,
    methods: tuple[str, ...] | None = None,
    epochs: float | None = None,
    steps: tuple[int, ...] | None = None,
    learning_rates: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] | None = None,
    model: str | None = None,
    train_data: str | None = None,
    test_data: str | None = None,
    data_dir: Path | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    train_tokens: int | None = None,
    dev_tokens: int | None = None,
    test_tokens: int | None = None,
    retrieval_samples: int | None = None,
    name: str | None = None,
    output: Path = Path("runs"),
    keep_adapters: bool = False,
) -> None:
    """Train and measure every method on the same data; what was done before is not done again.

    Args:
        config: an experiment as JSON; the options given beside it win.
        methods: base, full, lora, dora, lorada, longlora, sparse, hylorada_v1, hylorada_v2, hylorada; or
            labels of the config file. [lora dora lorada hylorada]
        epochs: passes over the training data [1, where steps are not given either].
        steps: optimizer steps, in place of epochs; several are budgets, each with runs of its own.
        learning_rates: that each method chooses its own from [5e-4 1e-3 2e-3]: of lora_A, lora_B learning
            ten times as fast (LoRA+); with a config file, as the file says. full and longlora want smaller
            ones, sparse has one of its own.
        seeds: of the adapters' start and the order of the data [0 1 2].
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        train_data: a file, a glob, a Hub dataset, python-stdlib or python-docstrings.
        test_data: to report on [half of what is held out of the training data].
        data_dir: where the files that the experiment names lie.
        batch_size: rows per step [2].
        seq_len: tokens per row [256].
        train_tokens: of the training data, about so many, spread evenly [16384; with a config file, its own].
        dev_tokens: of the held-out data, to choose a learning rate by [4096].
        test_tokens: of the test data [8192]: all are scored by place, and for perplexity half, which are read
            with at least half a window of context.
        retrieval_samples: facts at each depth of the retrieval probe [0, which leaves it out].
        name: of the directory of results [the config file's; benchmark].
        output: where that directory lies.
        keep_adapters: keep the adapter of each run that is done now, in <output>/<name>/adapters/.
    """
    given = {
        key: value
        for key, value in locals().items()
        if value is not None and key not in ("config", "data_dir", "output", "keep_adapters")
    }
    command = started()
    # A benchmark that goes on after a kill finds its compiled programs. JAX asks when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "hylorada" / "jax"))
    experiment = _experiment(config, given)
    from benchmarks import report  # after what a typing error meets
    from benchmarks.benchmark import Benchmark

    directory = output / experiment.name
    Benchmark(experiment, directory, data_dir, command, keep_adapters=keep_adapters).run()
    report.main(directory)


def _experiment(config: Path | None, given: dict[str, Any]) -> Experiment:
    """That of the file, or the default one, with the options given beside it."""
    labels = given.pop("methods", None)
    rates = given.pop("learning_rates", None)
    if config is None:
        if not given.keys() & {"epochs", "steps"}:
            given["epochs"] = 1.0
        given.setdefault("train_tokens", 16384)
        # Which the grid of learning rates is made for.
        experiment = Experiment(adapter={"lora_plus_enabled": True}, **given)
    else:
        experiment = Experiment.load(config, **given)
    if labels is not None:
        methods = {label: experiment.methods.get(label, {}) for label in labels}
        experiment = dataclasses.replace(experiment, methods=methods)
    if rates is not None:
        experiment = dataclasses.replace(experiment, **_with_rates(experiment, rates))
    return experiment


def _with_rates(experiment: Experiment, rates: Sequence[float]) -> dict[str, Any]:
    """The grid of all methods, and the methods without rates in grids of their own."""
    methods = {label: dict(settings) for label, settings in experiment.methods.items()}
    for settings in methods.values():
        if "grid" in settings:
            own = settings["grid"].items()
            settings["grid"] = {name: values for name, values in own if name != "learning_rate"}
    return {"methods": methods, "grid": {**experiment.grid, "learning_rate": rates}}


if __name__ == "__main__":
    run(main)
