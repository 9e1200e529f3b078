"""Several models by the same measures on the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hylorada_jax.evaluation.lost_in_the_middle import LostInTheMiddle, evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import Perplexity, evaluate_perplexity
from hylorada_jax.model import HyLoRADAModel


class Measures(NamedTuple):
    """What is measured of a model.

    Attributes:
        parameters: trainable ones; 0 of a base model.
        perplexity: by a sliding window.
        by_place: by the place in the sequence; ``.perplexity`` is LiM PPL.
    """

    parameters: int
    perplexity: Perplexity
    by_place: LostInTheMiddle


def compare_models(
    models: Mapping[str, Any],
    documents: Sequence[Any],
    *,
    seq_len: int = 1024,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, Measures]:
    """Perplexity and LiM perplexity of several models on the same windows.

    Args:
        models: by name; each a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models.
        documents: token ids of each document, of a tokenizer that all the models share.
        seq_len: tokens per window.
        batch_size: rows at a time.
        max_tokens: evaluate on about this many tokens, the same for all; None takes all.
        progress: show progress bars on stderr.

    Returns:
        The measures of each model, by its name.

    Raises:
        DataError: no document fills a window, or a token id is outside a model's vocabulary.
    """
    options: dict[str, Any] = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "progress": progress,
    }
    return {
        name: Measures(
            model.num_trainable if isinstance(model, HyLoRADAModel) else 0,
            evaluate_perplexity(model, documents, **options),
            evaluate_lost_in_the_middle(model, documents, **options),
        )
        for name, model in models.items()
    }
