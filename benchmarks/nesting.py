"""Does the structure prior help where code is nested deeper than in training?

    python benchmarks/nesting.py --test-tokens 16384 --output benchmarks/results --page docs/choosing.md

Each method learns the Python standard library's source by the tokens of small nesting depths alone, and is
tested on other files: on tokens of these depths, and on deeper ones. hylorada_v2 reads each token's depth, or
does not; hylorada_v1 has no structure prior. Each method's rate is the one with the least loss on training
files held out, at the small depths and with the first seed.

Every run is a file in <output>/nesting/rate<rate>/, and what was killed goes on where it was. In the page the
table takes the place of what stands between `<!-- results:nesting -->` and `<!-- end -->`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.command import run
from benchmarks.experiment import BASE, require_each_once
from benchmarks.intervals import WORDS, paired_difference
from benchmarks.kept import Record, by_method, kept
from benchmarks.report import (
    among,
    check_page,
    ends,
    fill_page,
    markdown,
    measured_on,
    over_seeds,
    plus_minus,
)
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.corpus import PYTHON_STDLIB
from hylorada_jax.errors import ConfigError
from hylorada_jax.io.files import refuse_unusable, write_whole
from hylorada_jax.terminal import show

NAME = "nesting"
WITHOUT, BLIND, READING = "hylorada_v1", "hylorada_v2, without depths", "hylorada_v2"
METHODS = (WITHOUT, BLIND, READING)
HELD_OUT = 20  # one training file in so many


def main(
    *,
    output: Path = Path("runs"),
    page: Path | None = None,
    model: str = "smollm2-135m",
    shallow: int = 2,
    deep: int = 4,
    steps: int = 64,
    batch_size: int = 2,
    seq_len: int = 256,
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3),
    test_tokens: int = 32768,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Train on code that is little nested, test on code that is more, and write the table.

    Args:
        output: of the directory "nesting", which the runs are written to.
        page: a Markdown file whose table is replaced.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        shallow: the largest depth whose tokens count in training.
        deep: the least depth of the deeper tokens.
        steps: optimizer steps.
        batch_size: rows per step.
        seq_len: tokens per row.
        learning_rates: that each method chooses its own from; peak, for A and B alike.
        test_tokens: about so many are read, spread evenly; as many held out ones.
        seeds: of the adapters' start and the order of the data.
    """
    refuse_unusable(output)
    if not 0 <= shallow < deep:
        rule = "Deeper tokens must be deeper than those that are trained on."
        raise ConfigError(rule, f"shallow {shallow}, deep {deep}", "Correct them.")
    require_each_once("seeds", seeds)
    require_each_once("learning_rates", learning_rates)
    check_page(page, NAME)
    settings = {
        "model": model, "shallow": shallow, "deep": deep, "steps": steps, "batch_size": batch_size,
        "seq_len": seq_len, "test_tokens": test_tokens,
    }  # fmt: skip
    directory = output / NAME
    nesting = Nesting(settings, learning_rates, directory)
    found = [nesting.run(BASE, None, 0)]
    for name in METHODS:
        best = min((nesting.run(name, rate, seeds[0]) for rate in learning_rates), key=_held_out)
        rate = best["settings"]["learning_rate"]
        found += [best, *(nesting.run(name, rate, seed) for seed in seeds[1:])]
    show(text := table(found, learning_rates))
    write_whole(directory / "table.md", text.encode())
    fill_page(page, NAME, text)


class Nesting:
    """The runs of one setting; those that are there are not done again.

    Args:
        settings: of all runs. Beside them stands a digest of the texts, which other Pythons have others of.
        learning_rates: of the trained ones.
        directory: of their files.

    Raises:
        ConfigError: a setting is out of range, or no token of the test is so deep.
    """

    def __init__(self, settings: Mapping[str, Any], learning_rates: Sequence[float], directory: Path) -> None:
        from hylorada_jax.data.corpus import load_documents
        from hylorada_jax.data.document import digest
        from hylorada_jax.data.tokenization import tokenize
        from hylorada_jax.models.tokenizer import load_tokenizer
        from hylorada_jax.training.config import TrainingConfig

        sizes = {name: settings[name] for name in ("steps", "batch_size", "seq_len")}
        self._training = {
            rate: TrainingConfig(output=directory, learning_rate=rate, **sizes)
            for rate in (None, *learning_rates)
        }
        tokenizer = load_tokenizer(settings["model"])
        train, test = (
            tokenize(load_documents(PYTHON_STDLIB, side), tokenizer, structure="code")
            for side in ("train", "eval")
        )
        held_out = train[::HELD_OUT]
        del train[::HELD_OUT]
        self._texts: dict[str, Any] = {"train": train, "held_out": held_out, "test": test}
        digests = {part: digest(texts) for part, texts in self._texts.items()}
        self._settings, self._directory = {**settings, "sha256": digests}, directory
        deepest = max(int(document.structure_ids.max()) for document in self._texts["test"])
        if settings["deep"] > deepest:
            rule = f"The test's files must have deeper tokens; the deepest are at {deepest}."
            raise ConfigError(rule, f"deep {settings['deep']}", "Give less.")
        self._base: Any = None

    def run(self, name: str, rate: float | None, seed: int) -> Record:
        """The record of a method, a rate (None for the base) and a seed, from its file where there is one."""
        config = None if name == BASE else HyLoRADAConfig(method=name.split(",")[0])
        settings = {**self._settings, "learning_rate": rate, "config": config and config.to_dict()}
        directory = self._directory if rate is None else self._directory / f"rate{rate:g}"
        return kept(
            directory, name, seed, settings, lambda: self._result(config, name == READING, rate, seed)
        )

    def _result(
        self, config: HyLoRADAConfig | None, structure: bool, rate: float | None, seed: int
    ) -> Record:
        from benchmarks.trial import trained
        from hylorada_jax.data.packing import Rows
        from hylorada_jax.evaluation.sweep import loss_sweep
        from hylorada_jax.models.loading import load_model

        if self._base is None:
            self._base = load_model(self._settings["model"])
        s = self._settings
        rows = Rows(counted(self._texts["train"], 0, s["shallow"], structure=structure), s["seq_len"])
        training = dataclasses.replace(self._training[rate], seed=seed)
        model, result = trained(self._base, config, rows, training)
        sweep = loss_sweep(model)
        measures = (
            ("held_out", "held_out", 0, s["shallow"]),
            ("shallow", "test", 0, s["shallow"]),
            ("deep", "test", s["deep"], 10**9),
        )
        for name, part, least, most in measures:
            rows = Rows(counted(self._texts[part], least, most, structure=structure), s["seq_len"])
            nll, tokens = np.zeros((2, len(self._texts[part])))  # of each document
            for batch, losses in sweep(rows, s["batch_size"], max_tokens=s["test_tokens"]):
                here = batch["targets"] >= 0
                documents = batch["document_ids"][here]
                nll += np.bincount(documents, losses[here], len(nll))
                tokens += np.bincount(documents, minlength=len(tokens))
            result[name] = list(zip(nll.tolist(), tokens.astype(int).tolist(), strict=True))
            print(f"    {name}: perplexity {np.exp(nll.sum() / tokens.sum()):.3f}", flush=True)
        return result


def counted(documents: Sequence[Any], least: int, most: int, *, structure: bool) -> list[Any]:
    """The documents of which the tokens of some depths count.

    Args:
        documents: with the depth of each token.
        least, most: of these depths.
        structure: a structure encoder is to read the depths.
    """
    return [
        dataclasses.replace(
            document if structure else document.without_structure(),
            scored=(document.structure_ids >= least) & (document.structure_ids <= most),
        )
        for document in documents
    ]


def table(runs: list[Record], rates: Sequence[float]) -> str:
    """The perplexities, and their differences to the same without what it reads.

    Args:
        runs: the records.
        rates: that each method chose from.
    """
    found = by_method(runs)
    sides = ("shallow", "deep")
    lines = [["", "rate", *(f"PPL, {side}" for side in sides), *(f"− {WITHOUT}, {side}" for side in sides)]]
    for name, some in found.items():
        rate = some[0]["settings"]["learning_rate"]
        cells = [name, "" if rate is None else among(rate, rates)]
        for side in sides:
            nll, tokens = _losses(some, side)
            cells.append(plus_minus(np.exp(nll.sum(1) / tokens.sum()).tolist(), 3))
        for side in sides:
            if name in (BASE, WITHOUT):
                cells.append("")
                continue
            (ours, tokens), (theirs, _) = (_losses(each, side) for each in (some, found[WITHOUT]))
            cells.append(paired_difference(ours, theirs, tokens).text(3))
        lines.append(cells)
    settings = runs[-1]["settings"]
    files = [len(_losses(runs[:1], side)[1]) for side in sides]
    body = markdown(lines)
    return (
        f"{body}\n\n{settings['model']}, {PYTHON_STDLIB}; {settings['steps']} steps of "
        f"{settings['batch_size']} × {settings['seq_len']} tokens, of which those at a depth of at most "
        f"{settings['shallow']} count; deep is {settings['deep']} and more, in other files. The rate is the "
        f"best of {len(rates)} for each method, on training files held out.{ends(body)} "
        f"{over_seeds(max(map(len, found.values())))}; differences with {WORDS} "
        f"{files[0]} files with shallow tokens, {files[1]} with deep ones. {measured_on(runs)}\n"
    )


def _held_out(run: Record) -> float:
    """The mean loss of a run on the training files held out."""
    nll, tokens = np.array(run["result"]["held_out"]).sum(0)
    return float(nll / tokens)


def _losses(runs: Sequence[Record], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses [runs, documents], and the tokens of each document that has any."""
    values = np.array([run["result"][side] for run in runs])
    tokens = values[0, :, 1]
    return values[:, tokens > 0, 0], tokens[tokens > 0]


if __name__ == "__main__":
    run(main)
