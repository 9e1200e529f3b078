"""An experiment under way: what of it is done, and what is to be done next."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks.experiment import BASE, Experiment, Variant, dev_loss, differences
from benchmarks.trainables import trainable
from benchmarks.trial import Runner, measure, require_row, training_rows
from hylorada_jax.data.corpus import PYTHON_STDLIB, load_documents
from hylorada_jax.data.document import TokenizedDocument, digest
from hylorada_jax.data.examples import Document
from hylorada_jax.data.packing import Rows
from hylorada_jax.data.tokenization import tokenize
from hylorada_jax.errors import CheckpointError, ConfigError, NonFiniteError
from hylorada_jax.evaluation.lost_in_the_middle import BUCKETS
from hylorada_jax.evaluation.retrieval import contexts
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.models.base_model import require_segments
from hylorada_jax.models.batch import Batch
from hylorada_jax.models.loading import empty_model, load_model
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.surgery.fit import fit
from hylorada_jax.terminal import one_line
from hylorada_jax.training.config import TrainingConfig
from parity_tests.environment import environment

Record = dict[str, Any]


class Benchmark:
    """An experiment under way; all that can be wrong with it is reported here, before a model is loaded.

    Args:
        experiment: what is compared.
        directory: of its runs.
        data_dir: where the files of its data lie; None where their paths say it.
        command: what started it, for the records.

    Raises:
        DataError: data is missing, or too short for a row or for the retrieval probe; a row is longer than
            the model's table of positions.
        ModelError: the model is not found, has no tokenizer, or cannot do what a method asks for.
        TargetError: a method's targets match no layer of it.
        ConfigError: a rate, a seed or a size is out of range, or the model cannot keep the documents of a row
            apart.
        CheckpointError: the directory holds runs of other settings.
    """

    def __init__(self, experiment: Experiment, directory: Path, data_dir: Path | None, command: str) -> None:
        refuse_unusable(directory)
        self._experiment, self._directory, self._command = experiment, directory, command
        empty = as_base(empty_model(experiment.model))
        require_segments(empty)
        check_range((experiment.batch_size, experiment.seq_len), limit=empty.position_limit)
        for variant in experiment.variants:
            if variant.config is not None:
                fit(empty, variant.config)
        if experiment.seq_len < BUCKETS:
            raise ConfigError(
                f"seq_len must have a token for each of {BUCKETS} places.", experiment.seq_len, "Give more."
            )
        self._tokenizer = load_tokenizer(experiment.model)
        texts = _texts(experiment, data_dir)
        plain = {part: tokenize(found, self._tokenizer) for part, found in texts.items()}
        for part, documents in plain.items():
            require_row(part, documents, experiment.seq_len)
        contexts(self._tokenizer, experiment.seq_len, experiment.retrieval_samples)
        self._texts: dict[str | None, dict[str, list[TokenizedDocument]]] = {None: plain}
        for structure in {variant.structure for variant in experiment.variants if variant.structure}:
            self._texts[structure] = {
                part: tokenize(found, self._tokenizer, structure) for part, found in texts.items()
            }
        rows = len(self._rows(plain["train"]))
        length = TrainingConfig(output="", epochs=experiment.epochs or 1, batch_size=experiment.batch_size)
        self._steps = experiment.steps or length.for_rows(rows).steps
        self._settings = {
            "model": experiment.model,
            "dtype": experiment.dtype,
            "steps": self._steps,
            "batch_size": experiment.batch_size,
            "seq_len": experiment.seq_len,
            "train_tokens": experiment.train_tokens,
            "dev_tokens": experiment.dev_tokens,
            "test_tokens": experiment.test_tokens,
            "retrieval_samples": experiment.retrieval_samples,
            "train_data": experiment.train_data,
            "test_data": experiment.test_data,
            "sha256": {part: digest(documents) for part, documents in plain.items()},
            "tokens": {part: sum(map(len, documents)) for part, documents in plain.items()},
        }
        for variant in experiment.variants:
            for rate in variant.learning_rates:
                for seed in self._seeds(variant):
                    if variant.kind != BASE:
                        self._training(rate, seed)
                    self._done(variant, rate, seed)
        self._base: Any = None

    def run(self) -> None:
        """Does what is missing, one method after the other."""
        for variant in self._experiment.variants:
            self._runner: Any = None
            first, *others = self._seeds(variant)
            grid = {rate: self._run(variant, rate, first) for rate in variant.learning_rates}
            best = min(grid, key=lambda rate: dev_loss(grid[rate]))
            for seed in others:
                self._run(variant, best, seed)

    def _seeds(self, variant: Variant) -> tuple[int, ...]:
        return (0,) if variant.kind == BASE else self._experiment.seeds

    def _run(self, variant: Variant, rate: float, seed: int) -> Record:
        """A run's record, from its file where there is one."""
        if (done := self._done(variant, rate, seed)) is not None:
            return done
        texts = self._texts[variant.structure]
        what = variant.label if variant.kind == BASE else f"{variant.label}, rate {rate:g}, seed {seed}"
        print(f"{one_line(what)} …", flush=True)
        try:
            model, result = self._trained(variant, rate, seed)
            result |= measure(model, texts["dev"], texts["test"], self._experiment, self._tokenizer)
            print(f"    perplexity {result['perplexity']:.3f}, by place {result['lim_perplexity']:.3f}")
        except NonFiniteError as error:  # a result too: the rate is not this method's
            result = {"diverged": error.received}
            print(f"    diverged: {error.received}")
        record = {
            "settings": self._settings_of(variant, rate, seed),
            "command": self._command,
            "environment": environment(),
            "result": result,
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        write_json(self._file(variant, rate, seed), record)
        return record

    def _trained(self, variant: Variant, rate: float, seed: int) -> tuple[Any, Record]:
        """A contestant after training, and what the table says of that."""
        experiment, documents = self._experiment, self._texts[variant.structure]["train"]
        if self._base is None:
            self._base = load_model(experiment.model, dtype=jnp.dtype(experiment.dtype))
        if self._runner is None:
            self._trainable = trainable(self._base, variant)
            self._runner = Runner(self._rows(documents))
        if self._trainable is None:
            return self._base, {"parameters": 0}
        trained, result = self._runner.train(self._trainable, self._training(rate, seed))
        return self._trainable.trained(trained), result

    def _training(self, rate: float, seed: int) -> TrainingConfig:
        return TrainingConfig(
            output=self._directory,
            steps=self._steps,
            batch_size=self._experiment.batch_size,
            seq_len=self._experiment.seq_len,
            learning_rate=rate,
            seed=seed,
        )

    def _rows(self, documents: list[TokenizedDocument]) -> Rows | list[Batch]:
        return training_rows(documents, self._experiment.seq_len, self._experiment.train_tokens)

    def _done(self, variant: Variant, rate: float, seed: int) -> Record | None:
        """The record of a run that was done, whose settings must be those of this one."""
        file = self._file(variant, rate, seed)
        if not file.exists():
            return None
        record = json.loads(file.read_text("utf-8"))
        if changed := differences(record["settings"], self._settings_of(variant, rate, seed)):
            raise CheckpointError(
                "A directory holds the runs of one experiment.",
                f"{file}: {changed}",
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
        return data if data_dir is None or data == PYTHON_STDLIB else str(data_dir / data)

    train_data = source(experiment.train_data)
    train, held_out = (load_documents(train_data, split, form="text") for split in ("train", "eval"))
    if experiment.test_data is not None:
        return {
            "train": train,
            "dev": held_out,
            "test": load_documents(source(experiment.test_data), form="text"),
        }
    if len(held_out) < 2:
        raise ConfigError(
            "Without test data, half of the held-out documents are tested on.",
            f"{experiment.train_data}: {len(held_out)} held out",
            "Give --test-data.",
        )
    return {"train": train, "dev": held_out[::2], "test": held_out[1::2]}
