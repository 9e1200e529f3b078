"""Do the parts that know the position help to find a fact in the middle of a long context?

    python benchmarks/recall.py --steps 48 --samples 4 --test-lengths 1024 2048 --output benchmarks/results \\
        --page docs/choosing.md

Every context gives ten people's numbers among sentences without one, and ends by asking for one of them
(key-value retrieval). Each method is trained to answer in contexts of some lengths, and tested on other ones,
of these lengths and of longer ones; with the parts that know the position, and without. The contexts of a
seed are the same for all methods.

Every run is a file in <output>/recall/, and what was killed goes on where it was. Draws accuracy.png there:
the accuracy by depth. In the page the table takes the place of what stands between `<!-- results:recall -->`
and `<!-- end -->`.
"""

from __future__ import annotations

import statistics
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
    check_page,
    draw,
    fill_page,
    markdown,
    measured_on,
    over_seeds,
    plus_minus,
    styles,
)
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, near
from hylorada_jax.io.files import refuse_unusable, write_whole
from hylorada_jax.terminal import show

NAME = "recall"
WITHOUT = "hylorada_v1"  # what the others are compared to: the same without their parts
METHODS: dict[str, dict[str, Any]] = {
    WITHOUT: {"method": "hylorada_v1"},
    "with the position gate": {"method": "hylorada_v1", "position_bias_enabled": True},
    "with DAA": {"method": "hylorada_v1", "daa_enabled": True},
    "with DAA and its position bias": {
        "method": "hylorada_v1",
        "daa_enabled": True,
        "daa_position_bias": True,
    },
    "hylorada": {"method": "hylorada"},
}
FACTS = 10


def main(
    *,
    output: Path = Path("runs"),
    page: Path | None = None,
    model: str = "smollm2-135m",
    methods: tuple[str, ...] = tuple(METHODS),
    train_lengths: tuple[int, ...] = (512, 1024),
    test_lengths: tuple[int, ...] = (512, 1024, 2048),
    steps: int = 64,
    learning_rate: float = 4e-3,
    samples: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Train methods to find facts, test them by depth and length, and write their table.

    Args:
        output: of the directory "recall", which the runs are written to.
        page: a Markdown file whose table is replaced.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        methods: of those that there are, which differ in the parts that know the position.
        train_lengths: tokens of the contexts that are trained on, as many tokens of each length.
        test_lengths: tokens of those that are tested.
        steps: optimizer steps of one row of the longest training length.
        learning_rate: peak, the same for all, for A and B alike.
        samples: contexts at each depth and length of the test.
        seeds: of the adapters' start, and of the contexts that are trained on.
    """
    refuse_unusable(output)
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"A method is one of {', '.join(METHODS)}.", unknown[0], near(unknown[0], METHODS))
    given = {"train_lengths": train_lengths, "test_lengths": test_lengths, "seeds": seeds}
    for name, values in given.items():
        require_each_once(name, values)
    check_page(page, NAME)
    settings = {
        "model": model, "train_lengths": list(train_lengths), "test_lengths": list(test_lengths),
        "steps": steps, "learning_rate": learning_rate, "samples": samples, "facts": FACTS,
    }  # fmt: skip
    directory = output / NAME
    recall = Recall(settings, directory)
    found = [recall.run(BASE, 0), *(recall.run(name, seed) for seed in seeds for name in methods)]
    text = table(found)
    show(text)
    write_whole(directory / "table.md", text.encode())
    plot(found, directory)
    fill_page(page, NAME, text)


class Recall:
    """The runs of one setting; those that are there are not done again.

    Args:
        settings: of all runs.
        directory: of their files.

    Raises:
        DataError: a context has no room for its facts, or is longer than the model's table of positions.
    """

    def __init__(self, settings: Mapping[str, Any], directory: Path) -> None:
        from hylorada_jax.evaluation.retrieval import contexts
        from hylorada_jax.models.loading import empty_model
        from hylorada_jax.models.positions import check_range
        from hylorada_jax.models.tokenizer import load_tokenizer
        from hylorada_jax.models.wrapped import as_base

        self._settings, self._directory = settings, directory
        lengths = [*settings["train_lengths"], *settings["test_lengths"]]
        self._longest = max(settings["train_lengths"])
        check_range((1, max(lengths)), limit=as_base(empty_model(settings["model"])).position_limit)
        self._tokenizer = load_tokenizer(settings["model"])
        contexts(self._tokenizer, min(lengths), 1, facts=FACTS)
        self._base: Any = None

    def run(self, name: str, seed: int) -> Record:
        """The record of a method and a seed, from its file where there is one."""
        config = None if name == BASE else HyLoRADAConfig.from_dict(METHODS[name])
        settings = {**self._settings, "config": config and config.to_dict()}
        return kept(self._directory, name, seed, settings, lambda: self._result(config, seed))

    def _result(self, config: HyLoRADAConfig | None, seed: int) -> Record:
        from benchmarks.trial import trained
        from hylorada_jax.evaluation.retrieval import evaluate_retrieval
        from hylorada_jax.models.loading import load_model
        from hylorada_jax.training.config import TrainingConfig

        if self._base is None:
            self._base = load_model(self._settings["model"])
        s = self._settings
        training = TrainingConfig(
            output=self._directory, steps=s["steps"], batch_size=1, seq_len=self._longest,
            learning_rate=s["learning_rate"], seed=seed,
        )  # fmt: skip
        model, result = trained(self._base, config, self._rows(seed), training)
        lengths = {}
        for length in s["test_lengths"]:
            found = evaluate_retrieval(
                model, self._tokenizer, seq_len=length, samples=s["samples"], facts=FACTS,
                batch_size=max(1, self._longest // length), progress=False,
            )  # fmt: skip
            lengths[str(length)] = {"accuracy": found.accuracy, "losses": np.round(found.losses, 4).tolist()}
            print(f"    {length} tokens: {found.mean:.2f} found", flush=True)
        return {**result, "lengths": lengths}

    def _rows(self, seed: int) -> Any:
        """As many rows as steps: of each length as many tokens, every context with its answer scored."""
        from hylorada_jax.data.document import TokenizedDocument
        from hylorada_jax.data.packing import Rows
        from hylorada_jax.evaluation.retrieval import DEPTHS, contexts

        documents = []
        for length in self._settings["train_lengths"]:
            count = self._settings["steps"] * self._longest // (length * len(self._settings["train_lengths"]))
            # The test's seed is 0; every sample of a seed has numbers and sentences of its own.
            some = contexts(self._tokenizer, length, -(-count // DEPTHS), facts=FACTS, seed=1 + seed)
            for context in np.random.default_rng(seed).permutation(np.array(some, object))[:count]:
                scored = np.zeros(len(context["tokens"]), bool)
                scored[-len(context["answer"]) :] = True
                documents.append(TokenizedDocument(np.array(context["tokens"], np.int32), scored))
        return Rows(documents, self._longest)


def table(runs: list[Record]) -> str:
    """What is found at each length, and the answers' perplexity less that of the same without the part.

    Args:
        runs: the records.
    """
    lengths = list(runs[0]["result"]["lengths"])
    lines = [["", *(f"found, {n} tokens" for n in lengths), *(f"perplexity, {n}: effect" for n in lengths)]]
    found = by_method(runs)
    for name, some in found.items():
        cells = [name]
        for length in lengths:
            means = [statistics.mean(run["result"]["lengths"][length]["accuracy"]) for run in some]
            cells.append(plus_minus(means, 2))
        for length in lengths:
            if name in (BASE, WITHOUT) or WITHOUT not in found:
                cells.append("")
                continue
            ours, theirs = (_losses(each, length) for each in (some, found[WITHOUT]))
            cells.append(paired_difference(ours, theirs, np.ones(ours.shape[1])).text(2))
        lines.append(cells)
    settings = runs[-1]["settings"]
    trained = " and ".join(map(str, settings["train_lengths"]))
    return (
        f"{markdown(lines)}\n\n{settings['model']}; trained in {settings['steps']} steps of one row on "
        f"contexts of {trained} tokens with {settings['facts']} facts, rate {settings['learning_rate']:g}; "
        f"tested on {settings['samples']} others at each of ten depths. "
        f"{over_seeds(max(map(len, found.values())))}. Effects are differences of exp(loss "
        f"of the answer) to {WITHOUT}'s, with {WORDS} {settings['samples']} numbers asked for, each at all "
        f"depths. {measured_on(runs)}\n"
    )


def _losses(runs: Sequence[Record], length: str) -> np.ndarray:
    """Of each run the losses of every number asked for, their mean over the depths, [runs, numbers].

    The contexts of a number are the same but for its place, so that they are no samples of their own.
    """
    return np.mean([run["result"]["lengths"][length]["losses"] for run in runs], axis=1)


def plot(runs: list[Record], directory: Path) -> None:
    """Draws the accuracy by depth in contexts of the longest length, a line for each method.

    Args:
        runs: the records.
        directory: of accuracy.png.
    """
    found = by_method(runs)
    longest = max(runs[0]["result"]["lengths"], key=int)
    style = styles(list(found))

    def accuracy(axes: Any) -> None:
        for name, some in found.items():
            curves = [run["result"]["lengths"][longest]["accuracy"] for run in some]
            axes.plot(range(1, len(curves[0]) + 1), np.mean(curves, axis=0), **style[name])
        axes.set(xlabel="tenth of the context where the fact stands", ylabel=f"found, of {longest} tokens")
        axes.legend()

    draw(directory / "accuracy.png", accuracy)


if __name__ == "__main__":
    run(main)
