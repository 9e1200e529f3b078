"""Perplexity of a base model or an adapted one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from tqdm import tqdm

from hylorada_jax.evaluation.faces import face_of
from hylorada_jax.training.data import as_documents, as_structure
from hylorada_jax.training.devices import replicate, shard_rows
from hylorada_jax.training.packing import Rows
from hylorada_jax.training.step import model_inputs, score


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
        return math.exp(self.loss) if self.loss < 700 else math.inf


class PerplexityEvaluator:
    """Perplexity on fixed documents, compiled once for any number of evaluations.

        PPL = exp(Σ_t nll_t / T)

    over the T predictions of all documents. A window of ``seq_len`` tokens starts every ``stride`` tokens. A
    token counts only in the first window that predicts it: none counts twice, and past the beginning of its
    document each has at least seq_len - stride tokens of context.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models.
        documents: token ids of each document.
        seq_len: tokens per window.
        stride: tokens between windows, 1 … seq_len; None takes half of ``seq_len``.
        batch_size: rows at a time; rounded up to a multiple of the devices.
        max_tokens: evaluate on rows of about this many tokens, spread evenly; None takes all.
        structure: structure ids of each document, for a model with a structure encoder; None for none.

    Raises:
        DataError: there is nothing to predict, a token id is outside the vocabulary, or structure ids do not
            fit the tokens.
        ConfigError: nothing in the model reads structure ids.

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
        structure: Sequence[Any] | None = None,
    ) -> None:
        self._face = face_of(model)
        checked = as_documents(documents, self._face.vocab_size, "evaluation")
        self._rows = Rows(
            checked,
            seq_len,
            stride=stride or max(1, seq_len // 2),
            packing=self._face.base.supports_segments,
            structure=as_structure(structure, checked, "evaluation", has_encoder=self._face.has_encoder),
        )
        devices = jax.device_count()
        self._batch_size = -(-batch_size // devices) * devices
        self._max_tokens = max_tokens
        self._resolve = jax.jit(self._face.resolve)
        self._score = jax.jit(self._sum_and_count)

    def _sum_and_count(self, resolved: Any, frozen: Any, rows: Mapping[str, Array]) -> tuple[Array, Array]:
        hidden = self._face.hidden(resolved, frozen, model_inputs(self._face.base, rows))
        return score(hidden, self._face.head(resolved, frozen), rows["targets"]).sum(), jnp.sum(
            rows["targets"] >= 0
        )

    def __call__(self, adapters: Any = None, frozen: Any = None, *, progress: bool = True) -> Perplexity:
        """Evaluates once.

        Args:
            adapters: a tree like ``model.adapters``, or None for those the model has now.
            frozen: ``model.frozen`` where it already is on the devices, or None.
            progress: show a progress bar on stderr.

        Returns:
            Loss and number of tokens.
        """
        frozen = replicate(self._face.frozen) if frozen is None else frozen
        adapters = replicate(self._face.adapters()) if adapters is None else adapters
        resolved = self._resolve(adapters, frozen)
        batches = list(self._rows.batches(self._batch_size, tokens=self._max_tokens))
        total, tokens = 0.0, 0
        with tqdm(batches, desc="evaluating", unit="batch", disable=not progress, leave=False) as bar:
            for batch in bar:
                nll, count = self._score(resolved, frozen, shard_rows(batch))
                total, tokens = total + float(nll), tokens + int(count)
                bar.set_postfix(perplexity=f"{Perplexity(total / max(tokens, 1), tokens).perplexity:.3f}")
        return Perplexity(total / tokens, tokens)


def evaluate_perplexity(
    model: Any,
    documents: Sequence[Any],
    *,
    seq_len: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    structure: Sequence[Any] | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a model on documents: :class:`PerplexityEvaluator`, once.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models.
        documents: token ids of each document.
        seq_len: tokens per window.
        stride: tokens between windows, 1 … seq_len; None takes half of ``seq_len``.
        batch_size: rows at a time.
        max_tokens: evaluate on rows of about this many tokens, spread evenly; None takes all.
        structure: structure ids of each document, for a model with a structure encoder; None for none.
        progress: show a progress bar on stderr.

    Returns:
        ``.loss`` in nats, ``.tokens`` and ``.perplexity``.

    Raises:
        DataError: there is nothing to predict, a token id is outside the vocabulary, or structure ids do not
            fit the tokens.
        ConfigError: nothing in the model reads structure ids.
    """
    evaluator = PerplexityEvaluator(
        model,
        documents,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        structure=structure,
    )
    return evaluator(progress=progress)
