"""A retrieval probe: is a fact found again, wherever in a long context it stands?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.errors import DataError
from hylorada_jax.evaluation.sweep import Sweep
from hylorada_jax.math.loss import IGNORED, logits
from hylorada_jax.models.base_model import vocab_size
from hylorada_jax.models.batch import Batch, padding
from hylorada_jax.models.ids import check_tokens
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.tokenizer import Tokenizer

DEPTHS = 10
# What the fact is hidden among: sentences without a number or a name.
_FILLER = (
    " Rain had fallen on the roofs since the early morning.",
    " A cart went slowly down the road to the harbour.",
    " Nobody in the house had heard the door.",
    " The bread was still warm when they sat down.",
    " Two boats lay on the sand, and the tide was out.",
    " Somebody had left a lamp burning in the hall.",
    " The letters were read aloud and put away again.",
    " Behind the garden the hills were already green.",
    " They spoke of the weather and of the price of wool.",
    " The old clock in the square had stopped again.",
)
_NAMES = ("Anna", "Peter", "Maria", "David", "Laura", "Thomas", "Julia", "Robert", "Helen", "Martin")
_FACT = " The number of {name}'s locker is {number}."
_QUESTION = " The number of {name}'s locker is"


class Retrieval(NamedTuple):
    """The result of a probe.

    Attributes:
        accuracy: the part of the facts found at each depth of the context, from its beginning to its end.
        samples: facts at each depth.
    """

    accuracy: tuple[float, ...]
    samples: int

    @property
    def mean(self) -> float:
        """Over all depths."""
        return float(np.mean(self.accuracy))


def evaluate_retrieval(
    model: Any,
    tokenizer: Tokenizer,
    *,
    seq_len: int = 512,
    samples: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Retrieval:
    """How often a number is found again that stood at one of ten depths of a long context.

    A sentence that gives somebody's number stands among sentences without one, and the text ends by asking
    for it. It is found where every token of the number is the most likely one.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models.
        tokenizer: the model's.
        seq_len: tokens of context.
        samples: facts at each depth; the same at all of them, and for every model.
        batch_size: contexts at a time.
        seed: of names, numbers and the order of sentences.
        progress: show a progress bar on stderr.

    Returns:
        The accuracy at every depth.

    Raises:
        DataError: the context is too short for a fact and a question among some sentences, longer
            than the model's table of positions, or the tokenizer gives an id outside its vocabulary.
        NonFiniteError: a logit is NaN or infinite.

    Example:
        evaluate_retrieval(load_model("smollm2-135m"), load_tokenizer("smollm2-135m"), samples=1).accuracy

    Source: after Liu et al. 2024, "Lost in the Middle", §3 (key-value retrieval).
    """
    sweep = Sweep(model, _found)
    check_range((batch_size, seq_len), limit=sweep.model.base.position_limit)
    texts = contexts(tokenizer, seq_len, samples, seed)
    vocab = vocab_size(sweep.model.base)
    for text in texts:
        check_tokens(text["tokens"], vocab, "the tokenizer's")
    width = max(len(text["answer"]) for text in texts)
    rows = [_padded(text, seq_len, width) for text in texts]
    bar = "retrieval" if progress else None
    found = np.concatenate([hits for _, hits in sweep(rows, batch_size, progress=bar)])
    return Retrieval(tuple(found[: len(rows)].reshape(DEPTHS, samples).mean(1).tolist()), samples)


def contexts(tokenizer: Tokenizer, seq_len: int, samples: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """What :func:`evaluate_retrieval` asks a model, as token ids; a DataError where they do not fit."""
    return [
        _row(tokenizer, seq_len, depth, np.random.default_rng((seed, sample)))
        for depth in range(DEPTHS)
        for sample in range(samples)
    ]


def _found(hidden: Array, head: Array, batch: Mapping[str, Array]) -> Array:
    asked = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
    scores = logits(asked, head)
    found = jnp.all((scores.argmax(-1) == batch["answer"]) | (batch["answer"] < 0), axis=1)
    return jnp.where(jnp.isfinite(scores).all((1, 2)), found, jnp.nan)  # what is not finite has no largest


def _row(tokenizer: Tokenizer, seq_len: int, depth: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """The tokens of a context with a fact at a depth, and those of its answer."""
    name, number = _NAMES[rng.integers(len(_NAMES))], int(rng.integers(10_000, 100_000))
    fact = tokenizer.encode(_FACT.format(name=name, number=number))
    question = tokenizer.encode(_QUESTION.format(name=name))
    answer = tokenizer.encode(f" {number}")
    begin = tokenizer.encode_prompt("").ids[:1]  # the bos token, where the model expects one
    begin = [] if begin != [tokenizer.bos_token_id] else begin
    room = seq_len - len(begin) - len(fact) - len(question) - len(answer)
    sentences: list[list[int]] = []
    while room > 0:
        sentence = tokenizer.encode(_FILLER[rng.integers(len(_FILLER))])
        room -= len(sentence)
        if room >= 0:
            sentences.append(sentence)
    if len(sentences) < DEPTHS - 1:
        raise DataError(
            f"A context must have room for {DEPTHS - 1} sentences beside the fact and the question.",
            f"seq_len {seq_len}: {len(sentences)} sentences",
            "Take a larger seq_len.",
        )
    before = round(depth * len(sentences) / (DEPTHS - 1))
    parts = [begin, *sentences[:before], fact, *sentences[before:], question, answer]
    return {"tokens": list(itertools.chain(*parts)), "answer": answer}


def _padded(text: dict[str, list[int]], seq_len: int, width: int) -> Batch:
    """A row of a context; each token of the answer is predicted at the place before it."""
    length, asked = len(text["tokens"]), len(text["answer"])
    row = padding(["input_ids", "segment_ids"], seq_len)
    row["input_ids"][:length] = text["tokens"]
    row["segment_ids"][:length] = 1
    places, answer = np.zeros(width, np.int32), np.full(width, IGNORED, np.int32)
    places[:asked] = np.arange(length - asked, length) - 1
    answer[:asked] = text["answer"]
    return row | {"places": places, "answer": answer}
