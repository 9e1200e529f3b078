"""One run of a benchmark: train, then measure."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.command import load_per_core
from benchmarks.experiment import Experiment
from benchmarks.trainables import Adapted, Full
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.loading import mixed_batches
from hylorada_jax.data.packing import Rows, default_stride, spread
from hylorada_jax.errors import DataError, NonFiniteError
from hylorada_jax.evaluation.lost_in_the_middle import evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import PerplexityEvaluator, perplexity
from hylorada_jax.evaluation.retrieval import evaluate_retrieval
from hylorada_jax.evaluation.sweep import loss_sweep
from hylorada_jax.models.base_model import require_segments
from hylorada_jax.models.batch import Batch, computed
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.memory import needed_bytes
from hylorada_jax.training.step import init_state, make_train_step


def require_row(name: str, documents: Sequence[TokenizedDocument], seq_len: int) -> None:
    """Raises a DataError for documents none of which has a row and a token more, its last target."""
    if (longest := max(map(len, documents))) <= seq_len:
        raise DataError(
            f"The {name} data must have a document of a row and a token more.",
            f"seq_len {seq_len}, and the longest document has {longest} tokens",
            "Give longer documents, or a smaller seq_len.",
        )


def training_rows(
    documents: Sequence[TokenizedDocument], seq_len: int, tokens: int | None
) -> Rows | list[Batch]:
    """The rows of documents, or some of about so many tokens, spread evenly."""
    rows = Rows(documents, seq_len)
    return rows if tokens is None else spread(rows, tokens)


def order(rows: Rows | Sequence[Batch], batch_size: int, seed: int, steps: int) -> str:
    """A digest of the numbers of the rows that so many steps train on, in their order."""
    batches = mixed_batches([(rows, 1)], batch_size, seed)
    return hashlib.sha256(b"".join(next(batches)["row"].tobytes() for _ in range(steps))).hexdigest()


@dataclasses.dataclass
class Runner:
    """Trains what differs in numbers alone: their step is compiled once.

    Attributes:
        rows: of the training data.
    """

    rows: Rows | Sequence[Batch]
    _compiled: Any = None

    def train(
        self,
        trainable: Adapted | Full,
        training: TrainingConfig,
        on_step: Callable[[int, Any], None] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Trains one from its start of the seed.

        Args:
            trainable: of the method and shapes that the first one had.
            training: steps, batches, rates and seed; rates and seed may differ from run to run.
            on_step: called at the start, as step 0, and after each step, with its number and the trainable
                tree.

        Returns:
            The trained tree, and what the table says of the training.

        Raises:
            NonFiniteError: a loss became NaN or infinite.
            ConfigError: the model cannot keep the documents of a row apart.
        """
        require_segments(base := trainable.model.base, base.name)
        adapters = trainable.start(training.seed)
        optimizer = trainable.optimizer(adapters, training)
        state = init_state(adapters, optimizer, training.seed)
        batches = mixed_batches([(self.rows, 1)], training.batch_size, training.seed)
        losses, seconds = [], []
        if on_step is not None:
            on_step(0, adapters)
        for step in range(1, training.steps + 1):
            batch = computed(next(batches))
            if self._compiled is None:
                wrapped = make_train_step(trainable.model, optimizer, training)
                self._compiled = wrapped.lower(state, trainable.model.frozen, batch).compile()
            began = time.perf_counter()
            state, metrics = self._compiled(state, trainable.model.frozen, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
            if not np.isfinite(losses[-1]):
                raise NonFiniteError(
                    "A loss must be finite.", f"{losses[-1]} at step {step}", "Take a smaller learning rate."
                )
            if on_step is not None:
                on_step(step, state.adapters)
        step_seconds = statistics.median(seconds[1:] or seconds)  # the first one also warms up
        return state.adapters, {
            "parameters": trainable.model.num_trainable,
            "losses": [round(loss, 5) for loss in losses],
            "seconds_per_step": step_seconds,
            "tokens_per_second": training.batch_size * training.seq_len / step_seconds,
            "program_bytes": needed_bytes(self._compiled),
            # How busy the machine was: times of one that had other work are not its best.
            "load_per_core": load_per_core(),
        }


def trained(
    base: Any, config: HyLoRADAConfig | None, rows: Rows | Sequence[Batch], training: TrainingConfig
) -> tuple[Any, dict[str, Any]]:
    """A base model with an adapter trained on rows, and what is known of the training; or itself alone."""
    if config is None:
        return base, {}
    adapted = Adapted(base, config)
    adapters, result = Runner(rows).train(adapted, training)
    return adapted.trained(adapters), result


class Evaluation:
    """The measures of a method's models, compiled once.

    Args:
        model: one of them: an adapted model or a base model.
        texts: held-out text, by which settings are chosen ("dev"), that to report on ("test"), and where the
            experiment has it, one of another kind ("other").
        experiment: how much of them, in what windows.
        tokenizer: the model's.
    """

    def __init__(
        self,
        model: Any,
        texts: Mapping[str, Sequence[TokenizedDocument]],
        experiment: Experiment,
        tokenizer: Tokenizer,
    ) -> None:
        self._sweep = loss_sweep(model)
        self._test, self._experiment, self._tokenizer = texts["test"], experiment, tokenizer
        self._options: dict[str, Any] = {"seq_len": experiment.seq_len, "batch_size": experiment.batch_size}
        self._held_out = {
            part: PerplexityEvaluator(
                self._sweep,
                texts[part],
                stride=experiment.seq_len,
                max_tokens=experiment.dev_tokens,
                **self._options,
            )
            for part in ("dev", "other")
            if part in texts
        }

    def dev_loss(self, adapters: Any) -> float:
        """The held-out loss, in nats; a NonFiniteError where it is NaN or infinite."""
        return self._held_out["dev"](adapters, progress=False).loss

    def measure(self, adapters: Any) -> dict[str, Any]:
        """What the table says of the model with these adapters.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        experiment = self._experiment
        self._sweep.model.adapters = adapters  # type: ignore[misc]
        passages = self._passages()
        nll, tokens = (math.fsum(column) for column in list(zip(*passages, strict=True))[1:])
        result = {
            "perplexity": perplexity(nll / tokens),
            "scored_tokens": int(tokens),
            "passages": [[number, round(nll, 4), tokens] for number, nll, tokens in passages],
        }
        options = {**self._options, "progress": False}
        if whole(self._test):
            by_place = evaluate_lost_in_the_middle(
                self._sweep, self._test, max_tokens=experiment.test_tokens, **options
            )
            result |= {
                "lim_perplexity": by_place.perplexity,
                "lim_buckets": by_place.buckets,
                "lim_middle": by_place.middle,
                "lim_ends": by_place.ends,
                "lim_sequences": by_place.sequences,
            }
        if "other" in self._held_out:
            other = self._held_out["other"](adapters, progress=False)
            result["other_perplexity"] = other.perplexity
        if experiment.retrieval_samples:
            samples = experiment.retrieval_samples
            found = evaluate_retrieval(self._sweep.model, self._tokenizer, samples=samples, **options)
            result["retrieval"] = found.accuracy
        return result

    def _passages(self) -> list[tuple[int, float, int]]:
        """Of each window of the test text: the document's number, the sum of its losses, scored tokens."""
        seq_len, batch_size = self._experiment.seq_len, self._experiment.batch_size
        rows = Rows(self._test, seq_len, stride=default_stride(seq_len))
        found = []
        for batch, losses in self._sweep(rows, batch_size, max_tokens=self._experiment.test_tokens):
            scored = np.where(batch["targets"] >= 0, batch["segment_ids"], 0)
            for row, segments in enumerate(scored):
                for segment in np.unique(segments[segments > 0]):
                    here = segments == segment
                    nll = float(losses[row, here].sum(dtype=np.float64))
                    found.append((int(batch["document_ids"][row, here][0]), nll, int(here.sum())))
        return found


def whole(documents: Sequence[TokenizedDocument]) -> bool:
    """All of the documents are texts, of which every token counts."""
    return all(document.scored is None for document in documents)
