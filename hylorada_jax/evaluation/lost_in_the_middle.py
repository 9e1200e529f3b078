"""Is a model lost in the middle? Perplexity by the place in the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hylorada_jax.data.document import as_documents
from hylorada_jax.data.packing import Rows, spread
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.evaluation.perplexity import perplexity
from hylorada_jax.evaluation.sweep import loss_sweep
from hylorada_jax.math.loss import IGNORED
from hylorada_jax.models.base_model import vocab_size
from hylorada_jax.models.positions import check_range

BUCKETS = 10


class LostInTheMiddle(NamedTuple):
    """The result of an evaluation.

    Attributes:
        losses: mean negative log-likelihood at each place of the sequence, in nats [seq_len]; 0 where nothing
            is scored.
        tokens: number of scored tokens at each place [seq_len].
        sequences: how many there were.
    """

    losses: np.ndarray
    tokens: np.ndarray
    sequences: int

    @property
    def buckets(self) -> list[float]:
        """Perplexity of each tenth of the sequence: exp of the mean loss of its tokens."""
        return [self._perplexity(places) for places in _parts(len(self.losses), BUCKETS)]

    @property
    def perplexity(self) -> float:
        """LiM PPL, the mean over the buckets."""
        return float(np.mean(self.buckets))

    @property
    def middle(self) -> float:
        """Perplexity of the middle third."""
        return self._perplexity(_parts(len(self.losses), 3)[1])

    @property
    def ends(self) -> float:
        """Perplexity of the first and the last third together."""
        first, _, last = _parts(len(self.losses), 3)
        return self._perplexity(np.concatenate([first, last]))

    def _perplexity(self, places: np.ndarray) -> float:
        return perplexity(float(np.average(self.losses[places], weights=self.tokens[places])))


def evaluate_lost_in_the_middle(
    model: Any,
    documents: Sequence[Any],
    *,
    seq_len: int = 1024,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: bool = True,
) -> LostInTheMiddle:
    """Perplexity by the place in the sequence, in ten buckets.

        PPL_b = exp(mean nll of the tokens in the b-th tenth of all sequences);   LiM PPL = Σ_b PPL_b / 10

    The sequences are the whole windows of ``seq_len`` predictions that the documents have, one after the
    other; what is left over at a document's end is not scored, nor a token whose document says so. The
    first tokens of a sequence have little context, so the first bucket is the highest of any model: compare
    models, or the middle with the end.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models; or what
            :func:`loss_sweep` makes of it, to compile once for several measures.
        documents: a :class:`TokenizedDocument` or a sequence of token ids per document.
        seq_len: predictions per sequence, at least ten.
        batch_size: sequences at a time.
        max_tokens: evaluate on sequences of about this many tokens, spread evenly; None takes all.
        progress: show a progress bar on stderr.

    Returns:
        ``.perplexity`` (LiM PPL), ``.buckets``, ``.middle``, ``.ends`` and ``.losses``.

    Raises:
        DataError: no document fills a sequence, nothing is scored in a tenth of them, a sequence is longer
            than the model's table of positions, a token id is outside the vocabulary, or a field of a
            document does not fit its tokens.
        ConfigError: nothing in the model reads structure, seq_len is below ten, or batch_size or max_tokens
            is not positive.
        NonFiniteError: a loss is NaN or infinite; it names the document.

    Example:
        held_out = tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
        evaluate_lost_in_the_middle(load_model("smollm2-135m"), held_out, seq_len=256, max_tokens=2048).middle

    Source: method.md, section 9; Liu et al. 2024, "Lost in the Middle".
    """
    if seq_len < BUCKETS:
        raise ConfigError(
            f"A sequence of {BUCKETS} parts has {BUCKETS} predictions or more.",
            f"seq_len {seq_len}",
            f"Give {BUCKETS} or more.",
        )
    sweep = loss_sweep(model)
    scored = sweep.model
    check_range((batch_size, seq_len), limit=scored.base.position_limit)
    vocab = vocab_size(scored.base)
    checked = as_documents(documents, vocab, "evaluation", has_encoder=scored.has_encoder)
    longest = max(map(len, checked))
    if longest <= seq_len:
        raise DataError(
            "A document must fill a sequence: it needs a token more than the sequence has predictions.",
            f"seq_len {seq_len}; the longest has {longest} tokens",
            "Give longer documents, or a smaller seq_len.",
        )
    rows = [row for row in Rows(checked, seq_len, packing=False) if row["segment_ids"].all()]
    if rows and max_tokens is not None:
        rows = spread(rows, max_tokens)
    tokens = sum((row["targets"] != IGNORED for row in rows), np.zeros(seq_len, int))
    if empty := [b for b, places in enumerate(_parts(seq_len, BUCKETS), 1) if not tokens[places].any()]:
        rule = f"Each of {BUCKETS} parts of the sequences must have a scored token."
        received = f"none in part {', '.join(map(str, empty))} of {len(rows)} sequences"
        raise DataError(rule, received, "Give more documents, or score more of their tokens.")
    total = np.zeros(seq_len)
    for _, losses in sweep(rows, batch_size, progress="by place" if progress else None):
        total += losses.sum(0, dtype=np.float64)
    return LostInTheMiddle(total / np.maximum(tokens, 1), tokens, len(rows))


def _parts(length: int, count: int) -> list[np.ndarray]:
    """The places of a sequence in as many parts, as equal as can be."""
    return np.array_split(np.arange(length), count)
