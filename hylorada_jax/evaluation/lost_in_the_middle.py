"""Is a model lost in the middle? Perplexity by the place in the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hylorada_jax.data.documents import as_documents, as_structure
from hylorada_jax.data.packing import Rows
from hylorada_jax.errors import DataError
from hylorada_jax.evaluation.perplexity import perplexity
from hylorada_jax.evaluation.sweep import loss_sweep
from hylorada_jax.models.base_model import vocab_size
from hylorada_jax.models.positions import check_range

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
        return [_perplexity_of(part) for part in np.array_split(self.losses, BUCKETS)]

    @property
    def perplexity(self) -> float:
        """LiM PPL, the mean over the buckets."""
        return float(np.mean(self.buckets))

    @property
    def middle(self) -> float:
        """Perplexity of the middle third."""
        return _perplexity_of(np.array_split(self.losses, 3)[1])

    @property
    def ends(self) -> float:
        """Perplexity of the first and the last third together."""
        first, _, last = np.array_split(self.losses, 3)
        return _perplexity_of(np.concatenate([first, last]))


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
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models; or what
            :func:`loss_sweep` makes of it, to compile once for several measures.
        documents: token ids of each document.
        seq_len: predictions per sequence, at least ten.
        batch_size: sequences at a time.
        max_tokens: evaluate on sequences of about this many tokens, spread evenly; None takes all.
        structure: structure ids of each document, for a model with a structure encoder; None for none.
        progress: show a progress bar on stderr.

    Returns:
        ``.perplexity`` (LiM PPL), ``.buckets``, ``.middle``, ``.ends`` and ``.losses``.

    Raises:
        DataError: no document fills a sequence, a sequence is longer than the model's table of positions, a
            token id is outside the vocabulary, or structure ids do not fit the tokens.
        ConfigError: nothing in the model reads structure ids, or seq_len or max_tokens is not positive.
        NonFiniteError: a loss is NaN or infinite; it names the document.

    Example:
        held_out = tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
        evaluate_lost_in_the_middle(load_model("smollm2-135m"), held_out, seq_len=256, max_tokens=2048).middle

    Source: method.md, section 9; Liu et al. 2024, "Lost in the Middle".
    """
    sweep = loss_sweep(model)
    check_range((batch_size, seq_len), limit=sweep.model.base.position_limit)
    checked = as_documents(documents, vocab_size(sweep.model.base), "evaluation")
    ids = as_structure(structure, checked, "evaluation", has_encoder=sweep.model.has_encoder)
    windows = Rows(checked, seq_len, packing=False, structure=ids, numbered=True)
    rows = [row for row in windows if row["segment_ids"].all()]
    if not rows or seq_len < BUCKETS:
        raise DataError(
            f"A document must fill a sequence, of at least {BUCKETS} tokens",
            f"seq_len {seq_len}, which needs a token more; the longest has {max(map(len, checked))}",
            "Give longer documents, or another seq_len.",
        )
    total, sequences = np.zeros(seq_len), 0
    bar = "by place" if progress else None
    for batch, losses in sweep(rows, batch_size, max_tokens=max_tokens, progress=bar):
        total += losses.sum(0, dtype=np.float64)
        sequences += int(batch["segment_ids"].any(1).sum())
    return LostInTheMiddle(total / sequences, sequences)


def _perplexity_of(losses: np.ndarray) -> float:
    return perplexity(float(losses.mean()))
