"""What is each method worth? All of them on the same data, tokens and seeds, one file per run.

    python benchmarks/run_benchmark.py --methods lora dora lorada hylorada --epochs 3
    python benchmarks/run_benchmark.py --config benchmarks/experiments/wikitext-2.json --data-dir wikitext-2

Every contestant is trained with each learning rate of the grid and the first seed; the rate with the least
loss on the held-out part of the training data is its own, and goes on with the other seeds. The test data
decides nothing. Every run is kept in <output>/<name>/, so that a benchmark that was killed goes on where it
was; `python benchmarks/report.py` draws the tables and plots from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

import tyro

from benchmarks.experiment import BASE, Experiment, Variant
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, HyLoRADAError
from hylorada_jax.training.corpus import Document, load_documents

Record = dict[str, Any]


def main(
    *,
    config: Path | None = None,
    methods: tuple[str, ...] | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    learning_rates: tuple[float, ...] | None = None,
    seeds: tuple[int, ...] | None = None,
    model: str | None = None,
    train_data: str | None = None,
    test_data: str | None = None,
    data_dir: Path | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dev_tokens: int | None = None,
    test_tokens: int | None = None,
    name: str | None = None,
    output: Path = Path("benchmarks/results"),
) -> None:
    """Train and measure every method on the same data; what was done before is not done again.

    Args:
        config: an experiment as JSON; the options given beside it win.
        methods: base, full, lora, dora, lorada, longlora, sparse, hylorada_v1, hylorada_v2, hylorada; or
            labels of the config file. [lora dora lorada hylorada]
        epochs: passes over the training data [1, where steps are not given either].
        steps: optimizer steps, in place of epochs.
        learning_rates: the grid that each method chooses its own from [5e-4 1e-3 2e-3].
        seeds: of the adapters' start and the order of the data [0 1 2].
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        train_data: a file, a glob, a Hub dataset, or python-stdlib, the embedded corpus.
        test_data: to report on [half of what is held out of the training data].
        data_dir: where files that the experiment names by a relative path lie.
        batch_size: rows per step [2].
        seq_len: tokens per row [256].
        dev_tokens: of the held-out data, to choose a learning rate by [4096].
        test_tokens: of the test data [8192].
        name: of the directory of results [the config file's; benchmark].
        output: where that directory lies.
    """
    given = {
        key: value
        for key, value in locals().items()
        if value is not None and key not in ("config", "data_dir", "output")
    }
    command = shlex.join(["python", *sys.argv])
    # A benchmark that goes on after a kill finds its compiled programs. JAX asks when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "hylorada" / "jax"))
    try:
        experiment = _experiment(config, given)
        benchmark = Benchmark(experiment, output / experiment.name, data_dir, command)
        benchmark.run()
    except HyLoRADAError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from benchmarks import report

    report.main(output / experiment.name)


def _experiment(config: Path | None, given: dict[str, Any]) -> Experiment:
    """That of the file, or the default one, with the options given beside it."""
    if config is None:
        if not given.keys() & {"epochs", "steps"}:
            given["epochs"] = 1.0
        if "methods" in given:
            given["methods"] = {name: {} for name in given["methods"]}
        return Experiment(**given)
    labels = given.pop("methods", None)
    experiment = Experiment.load(config, **given)
    if labels is None:
        return experiment
    methods = {label: experiment.methods.get(label, {}) for label in labels}
    return dataclasses.replace(experiment, methods=methods)


class Benchmark:
    """An experiment under way; all that can be wrong with it is reported here, before a model is loaded.

    Args:
        experiment: what is compared.
        directory: of its runs.
        data_dir: where relative paths of its data begin.
        command: what started it, for the records.

    Raises:
        DataError: data is missing, or too short for a row.
        ModelError: the model is not found or has no tokenizer.
        TargetError: a method's targets match no layer of it.
        CheckpointError: the directory holds runs of other settings.
    """

    def __init__(self, experiment: Experiment, directory: Path, data_dir: Path | None, command: str) -> None:
        from benchmarks.trial import Text
        from hylorada_jax.models.loading import model_init
        from hylorada_jax.models.tokenizer import load_tokenizer
        from hylorada_jax.surgery.modules import find_modules
        from hylorada_jax.surgery.plan import plan
        from hylorada_jax.training.data import digest, tokenize, tokenize_with_structure
        from hylorada_jax.training.packing import Rows

        self._experiment, self._directory, self._command = experiment, directory, command
        modules = find_modules(model_init(experiment.model))
        for variant in experiment.variants:
            if variant.config is not None:
                plan(modules, variant.config)
        self._tokenizer = load_tokenizer(experiment.model)
        texts = _texts(experiment, data_dir)
        plain = {part: Text(tokenize(found, self._tokenizer), None) for part, found in texts.items()}
        for part, text in plain.items():
            if (longest := max(map(len, text.tokens))) <= experiment.seq_len:
                raise DataError(
                    f"The {part} data must have a document of a row and a token more",
                    f"seq_len {experiment.seq_len}, and the longest document has {longest} tokens",
                    "Give longer documents, or a smaller seq_len.",
                )
        self._texts: dict[str | None, dict[str, Text]] = {None: plain}
        for structure in {variant.structure for variant in experiment.variants if variant.structure}:
            told = {part: tokenize_with_structure(t, self._tokenizer, structure) for part, t in texts.items()}
            self._texts[structure] = {p: Text(t.tokens, t.structure_ids) for p, t in told.items()}
        rows = len(Rows(plain["train"].tokens, experiment.seq_len))
        self._steps = experiment.steps or math.ceil((experiment.epochs or 1) * rows / experiment.batch_size)
        self._settings = {
            "model": experiment.model,
            "dtype": experiment.dtype,
            "steps": self._steps,
            "batch_size": experiment.batch_size,
            "seq_len": experiment.seq_len,
            "dev_tokens": experiment.dev_tokens,
            "test_tokens": experiment.test_tokens,
            "retrieval_samples": experiment.retrieval_samples,
            "train_data": experiment.train_data,
            "test_data": experiment.test_data,
            "sha256": {part: digest(text.tokens) for part, text in plain.items()},
            "tokens": {part: sum(map(len, text.tokens)) for part, text in plain.items()},
        }
        for variant in experiment.variants:
            for rate in variant.learning_rates:
                for seed in self._seeds(variant):
                    self._done(variant, rate, seed)
        self._base: Any = None

    def run(self) -> None:
        """Does what is missing, one method after the other."""
        for variant in self._experiment.variants:
            self._runner: Any = None
            first, *others = self._seeds(variant)
            grid = {rate: self._run(variant, rate, first) for rate in variant.learning_rates}
            best = min(grid, key=lambda rate: grid[rate]["result"]["dev_loss"])
            for seed in others:
                self._run(variant, best, seed)

    def _seeds(self, variant: Variant) -> tuple[int, ...]:
        return (0,) if variant.kind == BASE else self._experiment.seeds

    def _run(self, variant: Variant, rate: float, seed: int) -> Record:
        """A run's record, from its file where there is one."""
        if (done := self._done(variant, rate, seed)) is not None:
            return done
        from benchmarks.trial import measure
        from hylorada_jax.io.files import write_whole
        from parity_tests.environment import environment

        texts = self._texts[variant.structure]
        what = variant.label if variant.kind == BASE else f"{variant.label}, rate {rate:g}, seed {seed}"
        print(f"{what} …", flush=True)
        model, trained = self._trained(variant, rate, seed)
        measured = measure(model, texts["dev"], texts["test"], self._experiment, self._tokenizer)
        record = {
            "settings": self._settings_of(variant, rate, seed),
            "command": self._command,
            "environment": environment(),
            "result": trained | measured,
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(variant, rate, seed), (json.dumps(record, indent=1) + "\n").encode())
        print(f"    perplexity {measured['perplexity']:.3f}, by place {measured['lim_perplexity']:.3f}")
        return record

    def _trained(self, variant: Variant, rate: float, seed: int) -> tuple[Any, Record]:
        import jax.numpy as jnp

        from benchmarks.contestants import contestant
        from benchmarks.trial import Runner
        from hylorada_jax.models.loading import load_model
        from hylorada_jax.training.config import TrainingConfig
        from hylorada_jax.training.packing import Rows

        experiment, text = self._experiment, self._texts[variant.structure]["train"]
        if self._base is None:
            self._base = load_model(experiment.model, dtype=jnp.dtype(experiment.dtype))
        if self._runner is None:
            entrant = contestant(self._base, variant)
            if entrant is None:
                return self._base, {"parameters": 0}
            self._runner = Runner(entrant, Rows(text.tokens, experiment.seq_len, structure=text.structure))
        training = TrainingConfig(
            output_dir=self._directory,
            steps=self._steps,
            batch_size=experiment.batch_size,
            seq_len=experiment.seq_len,
            learning_rate=rate,
            seed=seed,
        )
        trained, result = self._runner.train(training)
        return self._runner.contestant.trained(trained), result

    def _done(self, variant: Variant, rate: float, seed: int) -> Record | None:
        """The record of a run that was done, whose settings must be those of this one."""
        file = self._file(variant, rate, seed)
        if not file.exists():
            return None
        record = json.loads(file.read_text("utf-8"))
        theirs, ours = record["settings"], self._settings_of(variant, rate, seed)
        # As JSON has it: a tuple comes back as a list.
        if theirs != (ours := json.loads(json.dumps(ours))):
            differing = [key for key in ours if theirs.get(key) != ours[key]]
            raise CheckpointError(
                "A directory holds the runs of one experiment",
                f"{file}: {', '.join(f'{key} {theirs.get(key)!r}, now {ours[key]!r}' for key in differing)}",
                "Choose another --name or --output, or remove the directory.",
            )
        return record

    def _settings_of(self, variant: Variant, rate: float, seed: int) -> Record:
        own = {"label": variant.label, "learning_rate": rate, "seed": seed, **variant.settings()}
        return self._settings | own

    def _file(self, variant: Variant, rate: float, seed: int) -> Path:
        slug = re.sub(r"[^\w.+-]+", "-", variant.label)
        ending = "" if variant.kind == BASE else f"-rate{rate:g}-seed{seed}"
        return self._directory / f"{slug}{ending}.json"


def _texts(experiment: Experiment, data_dir: Path | None) -> dict[str, list[Document]]:
    """The documents to train on, to choose the learning rate by, and to report on."""

    def source(data: str) -> str:
        return str(data_dir / data) if data_dir is not None and (data_dir / data).exists() else data

    train_data = source(experiment.train_data)
    train, held_out = (load_documents(train_data, split) for split in ("train", "eval"))
    if experiment.test_data is not None:
        return {"train": train, "dev": held_out, "test": load_documents(source(experiment.test_data))}
    if len(held_out) < 2:
        raise ConfigError(
            "Without test data, half of the held-out documents are tested on",
            f"{experiment.train_data}: {len(held_out)} held out",
            "Give --test-data.",
        )
    return {"train": train, "dev": held_out[::2], "test": held_out[1::2]}


if __name__ == "__main__":
    tyro.cli(main)
