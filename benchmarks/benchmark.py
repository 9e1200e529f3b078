"""An experiment under way: what of it is done, and what is to be done next."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.experiment import BASE, Candidate, Experiment, Variant, best_part, dev_loss
from benchmarks.kept import Record, stored, written
from benchmarks.rows import is_measured
from benchmarks.trainables import Adapted, Full, trainable
from benchmarks.trial import Evaluation, Runner, order, require_row, training_rows, whole
from hylorada_jax.data.corpus import PYTHON_DOCSTRINGS, PYTHON_STDLIB, load_documents
from hylorada_jax.data.document import TokenizedDocument, digest
from hylorada_jax.data.examples import Example
from hylorada_jax.data.packing import Rows
from hylorada_jax.data.tokenization import prepare, tokenize
from hylorada_jax.errors import ConfigError, NonFiniteError
from hylorada_jax.evaluation.lost_in_the_middle import BUCKETS
from hylorada_jax.evaluation.retrieval import contexts
from hylorada_jax.io.files import refuse_unusable
from hylorada_jax.models.base_model import require_segments
from hylorada_jax.models.batch import Batch
from hylorada_jax.models.loading import empty_model, load_model
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.structure.code import Domain
from hylorada_jax.surgery.fit import fit
from hylorada_jax.terminal import one_line
from hylorada_jax.training.config import TrainingConfig

# What a compiled step is given as numbers: runs that differ in these alone share its program.
_NUMBERS = (
    "lora_A_init", "lora_A_gain", "gate_init", "residual_init", "lora_plus_ratio", "learning_rate",
    "weight_decay",
)  # fmt: skip


class Run(NamedTuple):
    """One training of one row of the table; of the base, its measures alone."""

    variant: Variant
    candidate: Candidate
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        words = [self.variant.label]
        if self.variant.kind != BASE:
            point = [f"{name}{_short(value)}" for name, value in self.candidate.point.items()]
            words += [f"{self.steps}steps", *point, f"seed{self.seed}"]
        return re.sub(r"[^\w.+-]+", "-", "-".join(words))

    def settings(self) -> Record:
        """What decides what it computes, beside what all runs have; JSON-able."""
        config = self.candidate.config
        return {
            "label": self.variant.label,
            "kind": self.variant.kind,
            "structure": self.variant.structure,
            "config": None if config is None else config.to_dict(),
            "point": dict(self.candidate.point),
            "learning_rate": self.candidate.point.get("learning_rate", 0.0),
            "steps": self.steps,
            "seed": self.seed,
        }


class Program(NamedTuple):
    """What is compiled for runs that differ in numbers alone."""

    runner: Runner
    evaluation: Evaluation


class Best(NamedTuple):
    """Of a search so far, the run with the least held-out loss, and what it trained."""

    name: str = ""
    adapters: Any = None
    result: Mapping[str, Any] = MappingProxyType({"dev_loss": math.inf})


class Benchmark:
    """An experiment under way; all that can be wrong with it is reported here, before a model is loaded.

    Args:
        experiment: what is compared.
        directory: of its runs.
        data_dir: where the files of its data lie; None where their paths say it.
        command: what started it, for the records.
        keep_adapters: write each run's adapter to <directory>/adapters/<run>.

    Raises:
        DataError: data is missing, or too short for a row or for the retrieval probe; a row is longer than
            the model's table of positions.
        ModelError: the model is not found, has no tokenizer, or cannot do what a method asks for.
        TargetError: a method's targets match no layer of it.
        ConfigError: a rate, a seed or a size is out of range, or the model cannot keep the documents of a row
            apart.
        CheckpointError: the directory holds runs of other settings.
    """

    def __init__(
        self,
        experiment: Experiment,
        directory: Path,
        data_dir: Path | None,
        command: str,
        *,
        keep_adapters: bool = False,
    ) -> None:
        refuse_unusable(directory)
        self._experiment, self._directory, self._command = experiment, directory, command
        self._keep_adapters = keep_adapters
        empty = as_base(empty_model(experiment.model))
        require_segments(empty, empty.name)
        check_range((experiment.batch_size, experiment.seq_len), limit=empty.position_limit)
        for variant in experiment.variants:
            if (config := variant.candidates[0].config) is not None:
                fit(empty, config)
        if experiment.seq_len < BUCKETS:
            raise ConfigError(
                f"seq_len must have a token for each of {BUCKETS} places.", experiment.seq_len, "Give more."
            )
        self._tokenizer = load_tokenizer(experiment.model)
        texts = _texts(experiment, data_dir)
        structures = {None, *(variant.structure for variant in experiment.variants)}
        self._texts: dict[str | None, dict[str, list[TokenizedDocument]]] = {
            structure: {part: self._tokenized(part, found, structure) for part, found in texts.items()}
            for structure in structures
        }
        plain = self._texts[None]
        for part, documents in plain.items():
            if whole(documents):
                require_row(part, documents, experiment.seq_len)
        if experiment.retrieval_samples:
            contexts(self._tokenizer, experiment.seq_len, experiment.retrieval_samples)
        rows = self._rows(plain["train"])
        length = TrainingConfig(output="", epochs=experiment.epochs or 1, batch_size=experiment.batch_size)
        self._budgets = experiment.steps or (length.for_rows(len(rows)).steps,)
        # What is forgotten is a measure: with another text, or without one, the runs stay the same.
        other = plain.get("other")
        self._other = {"data": experiment.other_data, "sha256": digest(other)} if other else None
        shared = {part: documents for part, documents in plain.items() if part != "other"}
        device = jax.devices()[0]
        self._settings = {
            "model": experiment.model,
            "dtype": experiment.dtype,
            # Not the processor's name: a benchmark goes on where another of its kind left it.
            "device": device.platform if device.platform == "cpu" else device.device_kind,
            "batch_size": experiment.batch_size,
            "seq_len": experiment.seq_len,
            "train_tokens": experiment.train_tokens,
            "dev_tokens": experiment.dev_tokens,
            "test_tokens": experiment.test_tokens,
            "retrieval_samples": experiment.retrieval_samples,
            "train_data": experiment.train_data,
            "test_data": experiment.test_data,
            "sha256": {part: digest(documents) for part, documents in shared.items()},
            "tokens": {part: sum(map(len, documents)) for part, documents in shared.items()},
        }
        self._order = functools.cache(functools.partial(order, rows, experiment.batch_size))
        for variant in experiment.variants:
            for steps in self._budgets:
                for candidate in variant.candidates:
                    for seed in experiment.seeds:
                        run = Run(variant, candidate, steps, seed)
                        if variant.kind != BASE:
                            self._training(run)
                            self._done(run)
        self._base: Any = None
        self._programs: dict[str, Program] = {}
        self._best = Best()

    def run(self) -> None:
        """Does what is missing: of each budget all methods' searches, and then the other seeds."""
        first, *others = self._experiment.seeds
        left: dict[str, Sequence[Candidate]] = {}
        for variant in self._experiment.variants:
            left[variant.label] = variant.candidates
            if variant.kind == BASE:
                self._record(Run(variant, variant.candidates[0], 0, 0))
        trained = [variant for variant in self._experiment.variants if variant.kind != BASE]
        for steps in self._budgets:
            self._programs = {}
            for variant in trained:
                left[variant.label] = self._ranked(variant, left[variant.label], steps, first)
            for seed in others:
                for variant in trained:
                    self._record(Run(variant, left[variant.label][0], steps, seed))
            left = {label: best_part(ranked, self._experiment.keep) for label, ranked in left.items()}

    def _ranked(
        self, variant: Variant, candidates: Sequence[Candidate], steps: int, seed: int
    ) -> list[Candidate]:
        """The candidates, the one with the least held-out loss first, which is measured on the test data."""
        self._best = Best()
        runs = [Run(variant, candidate, steps, seed) for candidate in candidates]
        measured = self._experiment.report_on == "all"
        losses = [dev_loss(self._record(run, measured=measured)) for run in runs]
        ranked = sorted(range(len(losses)), key=losses.__getitem__)
        self._record(runs[ranked[0]])
        return [candidates[at] for at in ranked]

    def _tokenized(
        self, part: str, texts: list[Example], structure: Domain | None
    ) -> list[TokenizedDocument]:
        if part != "train":  # measured in windows, which overlap: nothing is cut off
            return tokenize(texts, self._tokenizer, structure)
        return prepare(texts, self._tokenizer, self._experiment.seq_len, structure=structure)[0]

    def _record(self, run: Run, *, measured: bool = True) -> Record:
        """A run's record, from its file where there is one; with or without measures of the test data."""
        done = self._done(run)
        if done is not None and (not measured or "dev_loss" not in done["result"] or self._is_measured(done)):
            return done
        print(f"{one_line(run.name)} …", flush=True)
        try:
            result = self._result(run, measured)
            found = f", perplexity {result['perplexity']:.3f}" if measured else ""
            print(f"    held out {result['dev_loss']:.4f}{found}", flush=True)
        except NonFiniteError as error:  # a result too: the settings are not this method's
            result = {"diverged": error.received}
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = {"out_of_memory": one_line(str(error))[:300]}
        if "dev_loss" not in result:
            print(f"    {result}", flush=True)
        return written(self._file(run), self._settings_of(run), self._command, result)

    def _result(self, run: Run, measured: bool) -> Record:
        """What the table says of a run."""
        if self._base is None:
            self._base = load_model(self._experiment.model, dtype=jnp.dtype(self._experiment.dtype))
        trained = trainable(self._base, run.variant.kind, run.candidate.config)
        program = self._compiled(run, self._base if trained is None else trained.model)
        if trained is None:
            result = {"parameters": 0, "dev_loss": program.evaluation.dev_loss({})}
            return result | self._measures(program, {})
        if run.name != self._best.name:
            new = Best(run.name, *self._train(run, trained, program))
            self._best = min(self._best, new, key=lambda best: best.result["dev_loss"])
        else:
            new = self._best
        return {**new.result, **(self._measures(program, new.adapters) if measured else {})}

    def _measures(self, program: Program, adapters: Any) -> Record:
        """What the table says of the model with these adapters."""
        found = program.evaluation.measure(adapters)
        return found if self._other is None else found | {"other": self._other}

    def _train(self, run: Run, trained: Adapted | Full, program: Program) -> tuple[Any, Record]:
        """What a run trains, and what is known of it without the test data."""
        held_out: dict[int, float] = {}
        ranks: dict[int, dict[str, float]] = {}

        def judge(step: int, adapters: Any) -> None:
            looked_at = step in _places(self._budgets[0], run.steps)
            if looked_at:
                held_out[step] = program.evaluation.dev_loss(adapters)
            if looked_at or step == 0:
                ranks[step] = trained.effective_ranks(adapters)

        adapters, result = program.runner.train(trained, self._training(run), on_step=judge)
        if self._keep_adapters and isinstance(trained, Adapted):
            trained.trained(adapters).save_pretrained(self._directory / "adapters" / run.name, overwrite=True)
        found = {"held_out": held_out, "effective_ranks": ranks, "dev_loss": held_out[run.steps]}
        return adapters, result | found

    def _compiled(self, run: Run, model: Any) -> Program:
        """What is compiled for a run, and for those of its budget that differ from it in numbers alone."""
        shape = {name: value for name, value in run.candidate.point.items() if name not in _NUMBERS}
        key = json.dumps([run.variant.label, shape], sort_keys=True)
        if key not in self._programs:
            texts = self._texts[run.variant.structure]
            evaluation = Evaluation(model, texts, self._experiment, self._tokenizer)
            self._programs[key] = Program(Runner(self._rows(texts["train"])), evaluation)
        return self._programs[key]

    def _training(self, run: Run) -> TrainingConfig:
        return TrainingConfig(
            output=self._directory,
            steps=run.steps,
            batch_size=self._experiment.batch_size,
            seq_len=self._experiment.seq_len,
            seed=run.seed,
            **run.candidate.training,
        )

    def _rows(self, documents: list[TokenizedDocument]) -> Rows | list[Batch]:
        return training_rows(documents, self._experiment.seq_len, self._experiment.train_tokens)

    def _done(self, run: Run) -> Record | None:
        """The record of a run that was done, whose settings must be those of this one."""
        remedy = "Choose another --name or --output, or remove the directory."
        return stored(self._file(run), self._settings_of(run), remedy, since=("order",))

    def _settings_of(self, run: Run) -> Record:
        """All that decides what a run computes: methods are compared on the same rows in the same order."""
        found = self._settings | run.settings()
        return found if run.variant.kind == BASE else found | {"order": self._order(run.seed, run.steps)}

    def _is_measured(self, record: Record) -> bool:
        return is_measured(record) and self._other in (None, record["result"].get("other"))

    def _file(self, run: Run) -> Path:
        return self._directory / f"{run.name}.json"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _places(first: int, steps: int) -> set[int]:
    """Where a run's held-out loss is looked at: at the first budget, at its doublings, and at the end."""
    return {first << i for i in range(steps.bit_length()) if first << i < steps} | {steps}


def _texts(experiment: Experiment, data_dir: Path | None) -> dict[str, list[Example]]:
    """The documents to train on, to choose settings by, to report on, and of another kind."""

    def source(data: str) -> str:
        if data_dir is None or data in (PYTHON_STDLIB, PYTHON_DOCSTRINGS):
            return data
        return str(data_dir / data)

    train, held_out = (load_documents(source(experiment.train_data), split) for split in ("train", "eval"))
    texts = {"train": train, "dev": held_out}
    if experiment.test_data is not None:
        texts["test"] = load_documents(source(experiment.test_data))
    elif len(held_out) < 2:
        raise ConfigError(
            "Without test data, half of the held-out documents are tested on.",
            f"{experiment.train_data}: {len(held_out)} held out",
            "Give --test-data.",
        )
    else:
        texts |= {"dev": held_out[::2], "test": held_out[1::2]}
    if experiment.other_data is not None:
        texts["other"] = load_documents(source(experiment.other_data), "eval")
    return texts
