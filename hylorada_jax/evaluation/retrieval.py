"""A retrieval probe: is a fact found again, wherever in a long context it stands?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.errors import ConfigError, DataError
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
    "Rain had fallen on the roofs since the early morning.",
    "A cart went slowly down the road to the harbour.",
    "Nobody in the house had heard the door.",
    "The bread was still warm when they sat down.",
    "Two boats lay on the sand, and the tide was out.",
    "Somebody had left a lamp burning in the hall.",
    "The letters were read aloud and put away again.",
    "Behind the garden the hills were already green.",
    "They spoke of the weather and of the price of wool.",
    "The old clock in the square had stopped again.",
)
_NAMES = ("Anna", "Peter", "Maria", "David", "Laura", "Thomas", "Julia", "Robert", "Helen", "Martin")
_FACT = "The number of {name}'s locker is {number}."
_QUESTION = "The number of {name}'s locker is"


class Retrieval(NamedTuple):
    """The result of a probe.

    Attributes:
        accuracy: the part of the facts found at each depth of the context, from its beginning to its end.
        losses: -log p of each answer, in nats, by depth and sample.
    """

    accuracy: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

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
    facts: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Retrieval:
    """How often a model finds a number at each of ten depths of a long context.

    A sentence that gives somebody's number stands among sentences without one, perhaps also among others that
    give other people's, and the text ends by asking for it. It is found where every token of the number is
    the most likely one.

    Args:
        model: a :class:`HyLoRADAModel`, a :class:`CausalLM` or one of HF's Flax models.
        tokenizer: the model's.
        seq_len: tokens of context.
        samples: numbers asked for at each depth; the same at all of them, and for every model.
        facts: people whose numbers a context gives, 1 … 10, each at a depth of its own.
        batch_size: contexts at a time.
        seed: of names, numbers and the order of sentences.
        progress: show a progress bar on stderr.

    Returns:
        ``.accuracy`` [10] in [0, 1] by depth, ``.losses`` [10, samples] in nats, and ``.mean``, the mean
        accuracy.

    Raises:
        DataError: the context is too short for its facts and a question among some sentences, longer
            than the model's table of positions, or the tokenizer gives an id outside its vocabulary.
        ConfigError: there are no facts, or more than depths, no samples, or no rows in a batch.
        NonFiniteError: a logit is NaN or infinite.

    Example:
        evaluate_retrieval(load_model("smollm2-135m"), load_tokenizer("smollm2-135m"), samples=1).accuracy

    Source: after Liu et al. 2024, "Lost in the Middle", §3 (key-value retrieval).
    """
    sweep = Sweep(model, _answered)
    check_range((batch_size, seq_len), limit=sweep.model.base.position_limit)
    texts = contexts(tokenizer, seq_len, samples, facts=facts, seed=seed)
    vocab = vocab_size(sweep.model.base)
    for text in texts:
        check_tokens(text["tokens"], vocab, "the tokenizer's")
    width = max(len(text["answer"]) for text in texts)
    rows = [_padded(text, seq_len, width) for text in texts]
    bar = "retrieval" if progress else None
    answers = np.concatenate([values for _, values in sweep(rows, batch_size, progress=bar)])
    found, losses = answers[: len(rows)].reshape(DEPTHS, samples, 2).transpose(2, 0, 1)
    return Retrieval(tuple(found.mean(1).tolist()), tuple(map(tuple, losses.tolist())))


def contexts(
    tokenizer: Tokenizer, seq_len: int, samples: int, *, facts: int = 1, seed: int = 0
) -> list[dict[str, list[int]]]:
    """What :func:`evaluate_retrieval` asks a model, as token ids, depth by depth; its errors."""
    if not 1 <= facts <= DEPTHS:
        rule = f"A context must have one fact at least, and no more than the {DEPTHS} depths."
        raise ConfigError(rule, f"{facts} facts", "Correct it.")
    if samples < 1:
        raise ConfigError("Each depth must be asked for at least once.", f"{samples} samples", "Correct it.")
    return [
        _row(tokenizer, seq_len, depth, facts, np.random.default_rng((seed, sample)))
        for depth in range(DEPTHS)
        for sample in range(samples)
    ]


def _answered(hidden: Array, head: Array, soft_cap: float | None, batch: Mapping[str, Array]) -> Array:
    """Of each row, whether its answer is the likeliest, and the answer's loss, [rows, 2]."""
    asked = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
    scores = logits(asked, head, soft_cap)
    counted = batch["answer"] >= 0
    found = jnp.all((scores.argmax(-1) == batch["answer"]) | ~counted, axis=1)
    found = jnp.where(jnp.isfinite(scores).all((1, 2)), found, jnp.nan)  # what is not finite has no largest
    answer = jnp.take_along_axis(scores, batch["answer"][..., None], axis=-1)[..., 0]
    losses = jnp.where(counted, jax.nn.logsumexp(scores, axis=-1) - answer, 0).sum(1)
    return jnp.stack([found, losses], axis=1)


def _row(
    tokenizer: Tokenizer, seq_len: int, depth: int, facts: int, rng: np.random.Generator
) -> dict[str, list[int]]:
    """The tokens of a context with the fact that is asked for at a depth, and those of its answer."""
    name, number = _NAMES[rng.integers(len(_NAMES))], int(rng.integers(10_000, 100_000))
    # Some tokenizers (Llama 2's) put a space before every text themselves, and ours would be a second one.
    lead = "" if tokenizer.encode("a b") == tokenizer.encode("a") + tokenizer.encode("b") else " "

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(lead + text)

    stated = {depth: tokens(_FACT.format(name=name, number=number))}
    beside = rng.spawn(1)[0]  # what else is stated changes neither the fact nor the sentences
    others = beside.permutation([other for other in _NAMES if other != name])
    free = beside.permutation([place for place in range(DEPTHS) if place != depth])
    for other, place in list(zip(others, free, strict=True))[: facts - 1]:
        stated[place] = tokens(_FACT.format(name=other, number=beside.integers(10_000, 100_000)))
    question = tokens(_QUESTION.format(name=name))
    whole = tokens(_QUESTION.format(name=name) + f" {number}")  # as in the fact, whatever a text begins with
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(question, whole, strict=False))
    question = [token for token, _ in same]
    answer = whole[len(question) :]
    begin = tokenizer.encode_prompt("").ids[:1]  # the bos token, where the model expects one
    begin = [] if begin != [tokenizer.bos_token_id] else begin
    room = seq_len - sum(map(len, (begin, *stated.values(), question, answer)))
    sentences: list[list[int]] = []
    while room > 0:
        sentence = tokens(_FILLER[rng.integers(len(_FILLER))])
        room -= len(sentence)
        if room >= 0:
            sentences.append(sentence)
    if len(sentences) < DEPTHS - 1:
        raise DataError(
            f"A context must have room for {DEPTHS - 1} sentences beside its facts and the question.",
            f"seq_len {seq_len}: {len(sentences)} sentences",
            "Take a larger seq_len.",
        )
    ends = [0, *(round(place * len(sentences) / (DEPTHS - 1)) for place in sorted(stated))]
    between = [sentences[start:end] for start, end in itertools.pairwise(ends)]
    stretch = [
        part for place, some in zip(sorted(stated), between, strict=True) for part in (*some, stated[place])
    ]
    parts = [begin, *stretch, *sentences[ends[-1] :], question, answer]
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
