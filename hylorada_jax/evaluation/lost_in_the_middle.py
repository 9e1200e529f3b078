"""Is a model lost in the middle? Perplexity by the place in the sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from hylorada_jax.errors import DataError
from hylorada_jax.evaluation.faces import face_of
from hylorada_jax.math.loss import IGNORED
from hylorada_jax.training.data import as_documents, as_structure
from hylorada_jax.training.devices import replicate, shard_rows
from hylorada_jax.training.packing import Batch
from hylorada_jax.training.step import model_inputs, score

BUCKETS = 10


class LostInTheMiddle(NamedTuple):
    """The result of an evaluation.

    Attributes:
        losses: mean negative log-likelihood at each place of the sequence, in nats [seq_len].
        sequences: how many there were.
    """

    losses: np.ndarray
    sequences: int

    @property
    def buckets(self) -> list[float]:
        """Perplexity of each tenth of the sequence: exp of the mean loss of its tokens."""
        return [_perplexity(part) for part in np.array_split(self.losses, BUCKETS)]

    @property
    def perplexity(self) -> float:
        """LiM PPL, the mean over the buckets."""
        return float(np.mean(self.buckets))

    @property
    def middle(self) -> float:
        """Perplexity of the middle third."""
        return _perplexity(np.array_split(self.losses, 3)[1])

    @property
    def ends(self) -> float:
        """Perplexity of the first and the last third together."""
        first, _, last = np.array_split(self.losses, 3)
        return _perplexity(np.concatenate([first, last]))


def evaluate_lost_in_the_middle(
    model: Any,
    documents: Sequence[Any],
    *,
    seq_len: int = 1024,
    batch_size: int = 8,
    max_tokens: int | None = None,
    structure: Sequence[Any] | None = None,
    progress: bool = True,
) -> LostInTheMiddle:
    """Perplexity by the place in the sequence, in ten buckets.

        PPL_b = exp(mean nll of the tokens in the b-th tenth of all sequences);   LiM PPL = Σ_b PPL_b / 10

    The sequences are the whole windows of ``seq_len`` predictions that the documents have, one after the
    other; what is left over at a document's end is not scored. The first tokens of a sequence have little
    context, so the first bucket is the highest of any model: compare models, or the middle with the end.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models.
        documents: token ids of each document.
        seq_len: predictions per sequence, at least ten.
        batch_size: sequences at a time; rounded up to a multiple of the devices.
        max_tokens: evaluate on sequences of about this many tokens, spread evenly; None takes all.
        structure: structure ids of each document, for a model with a structure encoder; None for none.
        progress: show a progress bar on stderr.

    Returns:
        ``.perplexity`` (LiM PPL), ``.buckets``, ``.middle``, ``.ends`` and ``.losses``.

    Raises:
        DataError: no document fills a sequence, a token id is outside the vocabulary, or structure ids do not
            fit the tokens.
        ConfigError: nothing in the model reads structure ids.

    Source: method.md, section 9; Liu et al. 2024, "Lost in the Middle".
    """
    face = face_of(model)
    checked = as_documents(documents, face.vocab_size, "evaluation")
    told = as_structure(structure, checked, "evaluation", has_encoder=face.has_encoder)
    rows = _rows(checked, told, seq_len)
    if max_tokens is not None:
        count = min(len(rows), max(1, max_tokens // seq_len))
        rows = [rows[i * len(rows) // count] for i in range(count)]
    batch_size = -(-batch_size // jax.device_count()) * jax.device_count()

    @jax.jit
    def nll_by_place(resolved: Any, frozen: Any, batch: Mapping[str, Array]) -> Array:
        hidden = face.hidden(resolved, frozen, model_inputs(face.base, batch))
        return score(hidden, face.head(resolved, frozen), batch["targets"]).sum(0)

    frozen = replicate(face.frozen)
    resolved = jax.jit(face.resolve)(replicate(face.adapters()), frozen)
    total = np.zeros(seq_len)
    for first in tqdm(range(0, len(rows), batch_size), desc="by place", disable=not progress, leave=False):
        batch = _stack(rows[first : first + batch_size], batch_size)
        total += np.asarray(nll_by_place(resolved, frozen, shard_rows(batch)), np.float64)
    return LostInTheMiddle(total / len(rows), len(rows))


def _rows(
    documents: Sequence[np.ndarray], structure: Sequence[np.ndarray] | None, seq_len: int
) -> list[Batch]:
    """The whole windows of every document."""
    rows = []
    for number, tokens in enumerate(documents):
        for start in range(0, len(tokens) - seq_len, seq_len):
            row = {"input_ids": tokens[start : start + seq_len], "targets": tokens[start + 1 :][:seq_len]}
            if structure is not None:
                row["structure_ids"] = structure[number][start : start + seq_len]
            rows.append(row)
    if not rows or seq_len < BUCKETS:
        raise DataError(
            f"A document must fill a sequence, of at least {BUCKETS} tokens",
            f"seq_len {seq_len}, which needs a token more; the longest has {max(map(len, documents))}",
            "Give longer documents, or another seq_len.",
        )
    return rows


def _stack(rows: Sequence[Batch], size: int) -> Batch:
    """A batch of rows, filled up with some that are not scored."""
    batch = {name: np.stack([row[name] for row in rows]).astype(np.int32) for name in rows[0]}
    missing = size - len(rows)
    batch = {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}
    batch["targets"][len(rows) :] = IGNORED
    batch["segment_ids"] = np.ones_like(batch["input_ids"])
    batch["position_ids"] = np.broadcast_to(
        np.arange(batch["input_ids"].shape[1], dtype=np.int32), batch["input_ids"].shape
    )
    return batch


def _perplexity(losses: np.ndarray) -> float:
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf
