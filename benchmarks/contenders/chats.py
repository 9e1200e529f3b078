"""Conversations that are made up, and preparing them: tokens and which of them count, by us and by TRL."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contenders.memory import reset_peak, resident, trim
from benchmarks.contenders.setting import Setting
from hylorada_jax.data.corpus import PYTHON_DOCSTRINGS, load_documents
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.examples import Conversation
from hylorada_jax.data.packing import Rows, batches, best_fit
from hylorada_jax.data.tokenization import prepare
from hylorada_jax.models.batch import Batch, computed
from hylorada_jax.models.tokenizer import Tokenizer, load_tokenizer

# What is not the same on both sides: it is stated with the figures.
DIFFERENCES = (
    "Template: SmolLM2's does not mark what the assistant writes, which TRL needs. All have it restated with "
    "{% generation %}, but for “template as packaged”, where we find the same tokens without marks.",
    "Preparation: ours tokenizes with the threads of the tokenizers library, and renders templates in a "
    "process of their own, within limits; TRL does both in one process, as is its default.",
    "Result: ours is arrays in memory, TRL's a table of datasets, also in memory.",
    "Step: ours is one compiled program. TRL's is a step of its own loop as Trainer.train() runs it, without "
    "gradient checkpointing and bfloat16, its defaults; that it reports entropy and accuracy is part of it.",
    "Loss: both sides score a part of the tokens at a time; neither holds all logits.",
    "Optimizer: AdamW after clipping by the global norm; ours has a rate and a decay per kind of parameter "
    "(LoRA+). DoRA: ours resolves its column scales once a step, PEFT in every forward pass.",
    "Packed: both pack best fit, TRL's then as one row without padding (bfd); attention keeps the "
    "conversations apart on both sides, by masks.",
    "“padded to the longest” is TRL's default: a batch is as wide as its longest row, not seq_len.",
)
Row = dict[str, list[dict[str, str]]]
"""A conversation as people keep it: {"messages": [{"role": …, "content": …}, …]}."""

TAGGED = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{{ '' }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's chat template restated, with what the assistant writes marked, end of turn included."""

_WARMUP = 64  # conversations: what a side starts once, it has started


def pieces() -> list[tuple[str, str]]:
    """What made-up conversations are of: lines that define a function, and what its docstring begins with."""
    found = set()
    for example in load_documents(PYTHON_DOCSTRINGS):
        assert isinstance(example, Conversation)
        question, answer = (message["content"] for message in example.messages)
        line = next(line for line in question.splitlines() if "def " in line)
        found.add((line.strip(), answer.split("\n\n")[0]))
    return sorted(found)


def made_up(of: Sequence[tuple[str, str]], count: int) -> list[Row]:
    """Conversations of two or three questions, the same ones every time.

    Args:
        of: from :func:`pieces`.
        count: of conversations.

    Example:
        >>> [row] = made_up([("def one():", "Return the number one.")], 1)
        >>> [message["content"] for message in row["messages"][:2]]
        ['What does `def one():` do?', 'Return the number one.']
    """
    random = np.random.default_rng(0)
    rows: list[Row] = []
    for turns in random.integers(2, 4, size=count):
        said: list[dict[str, str]] = []
        for line, answer in (of[number] for number in random.integers(len(of), size=turns)):
            said.append({"role": "user", "content": f"What does `{line}` do?"})
            said.append({"role": "assistant", "content": answer})
        rows.append({"messages": said})
    return rows


class Preparation(NamedTuple):
    """One side's way from rows to what it trains on.

    Attributes:
        load: rows → its data set.
        prepare: the data set → what it trains on. This is what is timed.
        read: that → of each conversation the ids and whether each counts.
    """

    load: Callable[[list[Row]], Any]
    prepare: Callable[[Any], Any]
    read: Callable[[Any], Iterable[tuple[Sequence[int], Sequence[bool]]]]


def tagged_tokenizer(model: str) -> Tokenizer:
    """A model's tokenizer with the template that marks what the assistant writes."""
    return dataclasses.replace(load_tokenizer(model), chat_template=TAGGED)


def _ours(tagged: bool, model: str, seq_len: int) -> Preparation:
    tokenizer = tagged_tokenizer(model) if tagged else load_tokenizer(model)

    def read(documents: list[TokenizedDocument]) -> Iterator[tuple[Sequence[int], Sequence[bool]]]:
        for document in documents:
            assert document.scored is not None
            yield document.tokens.tolist(), document.scored.tolist()

    return Preparation(load_documents, lambda data: prepare(data, tokenizer, seq_len)[0], read)


def _trl(model: str, seq_len: int) -> Preparation:
    from benchmarks.contenders import in_trl

    return Preparation(in_trl.dataset, functools.partial(in_trl.prepared, model, seq_len), in_trl.read)


PREPARATIONS: dict[str, Callable[[str, int], Preparation]] = {
    "ours": functools.partial(_ours, True),
    "ours, template as packaged": functools.partial(_ours, False),
    "trl": _trl,
}


def timed_preparation(
    name: str, model: str, seq_len: int, of: Sequence[tuple[str, str]], count: int
) -> dict[str, Any]:
    """Prepares conversations once; to be called in a process that has done nothing else.

    Args:
        name: a key of `PREPARATIONS`.
        model: whose tokenizer it is.
        seq_len: tokens to which a conversation is cut.
        of: from :func:`pieces`.
        count: of conversations.

    Returns:
        "seconds"; "peak_resident_bytes", held at most beyond what was there before, the process that renders
        templates included, and "result_bytes", of these what is still held with the result; None where it
        cannot be known; "tokens", "scored", and the "digest" of both up to the last token that counts.
    """
    import psutil

    side = PREPARATIONS[name](model, seq_len)
    data = side.load(made_up(of, count))
    side.prepare(side.load(made_up(of, min(count, _WARMUP))))
    before = _settled()
    reset_peak()
    start = time.perf_counter()
    result = side.prepare(data)
    seconds = time.perf_counter() - start
    children = [resident("VmHWM", child.pid) or 0 for child in psutil.Process().children(recursive=True)]
    peak, after = resident("VmHWM"), _settled()
    tokens = scored = 0
    digest = hashlib.sha256()
    for ids, counts in side.read(result):
        # After the last answer TRL keeps the end of the line, and so do we where the template has marks.
        stop = len(counts) - next((n for n, one in enumerate(reversed(counts)) if one), len(counts))
        tokens, scored = tokens + stop, scored + sum(counts)
        digest.update(np.array(list(zip(ids[:stop], counts[:stop], strict=True)), np.int64).tobytes())
    known = None not in (before, peak, after)
    return {
        "seconds": seconds,
        "peak_resident_bytes": peak - before + sum(children) if known else None,  # type: ignore[operator]
        "result_bytes": after - before if known else None,  # type: ignore[operator]
        "tokens": tokens,
        "scored": scored,
        "digest": digest.hexdigest(),
    }


def _settled() -> int | None:
    """What the process holds when what it does not need has been given back."""
    gc.collect()
    trim()
    return resident("VmRSS")


def fitting(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """The first conversations that fill whole batches, one to a row, and packed fit into the rows of one."""
    size, seq_len = setting.batch_size, setting.seq_len
    documents = prepare(load_documents(rows), tagged_tokenizer(setting.model), seq_len)[0]
    found = [(row, len(d)) for row, d in zip(rows, documents, strict=True) if len(d) <= seq_len]
    count = size
    while count < len(found) and len(best_fit([n for _, n in found[: count + size]], seq_len)) <= size:
        count += size
    return [row for row, _ in found[:count]]


def our_batches(rows: Sequence[Row], setting: Setting, *, packing: bool) -> tuple[list[Batch], list[int]]:
    """What our step gets of conversations, and the tokens of the conversations in each batch."""
    documents = prepare(load_documents(rows), tagged_tokenizer(setting.model), setting.seq_len)[0]
    found = [*batches(Rows(documents, setting.seq_len, packing=packing), setting.batch_size)]
    # The last token of a document is only predicted, and stands in no row.
    tokens = [
        int((batch["segment_ids"] > 0).sum() + batch["segment_ids"].max(axis=1).sum()) for batch in found
    ]
    return [computed(batch) for batch in found], tokens
