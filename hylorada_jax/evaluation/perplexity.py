"""Perplexity of a base model or an adapted one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hylorada_jax.data.document import as_documents
from hylorada_jax.data.packing import Rows, default_stride
from hylorada_jax.evaluation.sweep import loss_sweep
from hylorada_jax.models.base_model import vocab_size
from hylorada_jax.models.positions import check_range
from hylorada_jax.trees import Adapters, Frozen


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class Perplexity(NamedTuple):
    """The result of an evaluation.

    Attributes:
        loss: mean negative log-likelihood per scored token, in nats.
        tokens: number of scored tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity(self.loss)


class PerplexityEvaluator:
    """Perplexity on fixed documents, compiled once for any number of evaluations.

        PPL = exp(Σ_t nll_t / T)

    over the T predictions of all documents, those of scored tokens where documents say which are. A window
    of ``seq_len`` tokens starts every ``stride`` tokens. A token counts only in the first window that
    predicts it: none counts twice, and past the beginning of its document each has at least
    seq_len - stride tokens of context.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models; or what
            :func:`loss_sweep` makes of it, to compile once for several measures.
        documents: a :class:`TokenizedDocument` or a sequence of token ids per document.
        seq_len: tokens per window.
        stride: tokens between windows, 1 … seq_len; None takes half of ``seq_len``.
        batch_size: rows at a time; rounded up to a multiple of the devices. With LongRoPE and dynamic NTK the
            longest of them decides how all are rotated.
        max_tokens: evaluate on rows of about this many tokens, spread evenly; None takes all.
        packing: short documents share a row, isolated from each other; None: if the model can do that.

    Raises:
        DataError: there is nothing to predict, a token id is outside the vocabulary, a window is longer than
            the model's table of positions, or a field of a document does not fit its tokens.
        ConfigError: nothing in the model reads structure, or seq_len or stride is out of range.

    Source: method.md, section 9; the Hugging Face guide "Perplexity of fixed-length models".
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[Any],
        *,
        seq_len: int,
        stride: int | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        packing: bool | None = None,
    ) -> None:
        self._sweep = loss_sweep(model)
        scored = self._sweep.model
        check_range((batch_size, seq_len), limit=scored.base.position_limit)
        vocab = vocab_size(scored.base)
        self._rows = Rows(
            as_documents(documents, vocab, "evaluation", has_encoder=scored.has_encoder),
            seq_len,
            stride=default_stride(seq_len) if stride is None else stride,
            packing=scored.base.supports_segments if packing is None else packing,
        )
        self._batch_size, self._max_tokens = batch_size, max_tokens

    def __call__(
        self, adapters: Adapters | None = None, frozen: Frozen | None = None, *, progress: bool = True
    ) -> Perplexity:
        """Evaluates once.

        Args:
            adapters: a tree like ``model.adapters``, or None for those the model has now.
            frozen: ``model.frozen`` where it already is on the devices, or None.
            progress: show a progress bar on stderr.

        Returns:
            Loss and number of tokens.

        Raises:
            ConfigError: batch_size or max_tokens is not positive.
            NonFiniteError: a loss is NaN or infinite; it names the document.
        """
        total, tokens = 0.0, 0
        for batch, losses in self._sweep(
            self._rows,
            self._batch_size,
            max_tokens=self._max_tokens,
            adapters=adapters,
            frozen=frozen,
            progress="evaluating" if progress else None,
        ):
            total += losses.sum(dtype=np.float64)
            tokens += int((batch["targets"] >= 0).sum())
        return Perplexity(float(total) / tokens, tokens)


def evaluate_perplexity(
    model: Any,
    documents: Sequence[Any],
    *,
    seq_len: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    packing: bool | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a model on documents: :class:`PerplexityEvaluator`, once.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models; or what
            :func:`loss_sweep` makes of it, to compile once for several measures.
        documents: a :class:`TokenizedDocument` or a sequence of token ids per document.
        seq_len: tokens per window.
        stride: tokens between windows, 1 … seq_len; None takes half of ``seq_len``.
        batch_size: rows at a time. With LongRoPE and dynamic NTK the longest of them decides how all are
            rotated, and the perplexity depends on it.
        max_tokens: evaluate on rows of about this many tokens, spread evenly; None takes all.
        packing: short documents share a row, isolated from each other; None: if the model can do that.
        progress: show a progress bar on stderr.

    Returns:
        ``.loss`` in nats, ``.tokens`` and ``.perplexity``.

    Raises:
        DataError: there is nothing to predict, a token id is outside the vocabulary, a window is longer than
            the model's table of positions, or a field of a document does not fit its tokens.
        ConfigError: nothing in the model reads structure, or seq_len, stride, batch_size or max_tokens is out
            of range.
        ModelError: the model is none of these.
        NonFiniteError: a loss is NaN or infinite; it names the document.

    Example:
        held_out = tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
        evaluate_perplexity(load_model("smollm2-135m"), held_out, seq_len=256, max_tokens=2048).perplexity

    Source: as :class:`PerplexityEvaluator`.
    """
    evaluator = PerplexityEvaluator(
        model,
        documents,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        packing=packing,
    )
    return evaluator(progress=progress)
