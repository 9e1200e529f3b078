"""Several models by the same measures on the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hylorada_jax.config import READS_STRUCTURE
from hylorada_jax.data.document import as_record
from hylorada_jax.errors import ConfigError
from hylorada_jax.evaluation.lost_in_the_middle import LostInTheMiddle, evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import Perplexity, evaluate_perplexity
from hylorada_jax.evaluation.sweep import loss_sweep


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
        documents: a :class:`TokenizedDocument` or a sequence of token ids per document, of a tokenizer that
            all the models share. Their structure is for those of the models that have a structure encoder.
        seq_len: tokens per window.
        batch_size: rows at a time.
        max_tokens: evaluate on about this many tokens, the same for all; None takes all.
        progress: show progress bars on stderr.

    Returns:
        ``.parameters``, ``.perplexity`` and ``.by_place`` of each model, by its name.

    Raises:
        DataError: no document fills a window, a token id is outside a model's vocabulary, or a field of a
            document does not fit its tokens.
        ModelError: one of the models is none.
        ConfigError: there is structure, and no model that reads it; or seq_len, batch_size or max_tokens is
            out of range.
        NonFiniteError: a loss is NaN or infinite; it names the document.

    Example:
        base = load_model("smollm2-135m")
        trained = HyLoRADAModel.from_pretrained(base, "runs/finetune/adapter")
        held_out = tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
        compare_models({"base": base, "trained": trained}, held_out, seq_len=256, max_tokens=2048)

    Source: method.md, section 9.
    """
    options: dict[str, Any] = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "progress": progress,
    }
    sweeps = {name: loss_sweep(model) for name, model in models.items()}
    structured = [as_record(document) for document in documents]
    plain = [document.without_structure() for document in structured]
    has_structure = any(document.has_structure for document in structured)
    if has_structure and not any(sweep.model.has_encoder for sweep in sweeps.values()):
        raise ConfigError(
            READS_STRUCTURE,
            ", ".join(models),
            "Leave it out of the documents.",
        )
    # Which rows max_tokens takes depends on what shares one: all pack, or none.
    packing = all(sweep.model.base.supports_segments for sweep in sweeps.values())
    texts = {name: structured if sweep.model.has_encoder else plain for name, sweep in sweeps.items()}
    return {
        name: Measures(
            sweep.model.num_trainable,
            evaluate_perplexity(sweep, texts[name], **options, packing=packing),
            evaluate_lost_in_the_middle(sweep, texts[name], **options),
        )
        for name, sweep in sweeps.items()
    }
