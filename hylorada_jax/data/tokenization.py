"""Texts, completions and conversations as tokens, and which of these count."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple, get_args

import numpy as np

from hylorada_jax.data import cache
from hylorada_jax.data.answers import Score, Scored, score_answers
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.examples import Conversation, Document, Example
from hylorada_jax.data.packing import check_windows
from hylorada_jax.errors import ConfigError, DataError, require_one_of
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.structure.code import Domain, fenced_depths, token_depths
from hylorada_jax.text import short, shown

Overlength = Literal["truncate", "drop", "error"]

_DOCUMENTS_AT_ONCE = 64


class Counts(NamedTuple):
    """What became of the rows of a data set.

    Attributes:
        rows: those that were read.
        documents: what they gave: one each, or several where a template parts the turns of a conversation.
        tokens: of the documents.
        scored: tokens that count where they are predicted.
        unscored: rows left out because nothing in them counts, perhaps after they were cut.
        too_long: rows left out for their length.
        truncated: documents that were cut.
    """

    rows: int
    documents: int
    tokens: int
    scored: int
    unscored: int
    too_long: int
    truncated: int


def tokenize(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    structure: Domain | None = None,
    score: Score = "answers",
    *,
    skipped: list[DataError] | None = None,
) -> list[TokenizedDocument]:
    """The tokens of each document, and which of them count.

    A text includes what the tokenizer's template adds and its end token, and all of it counts. In completions
    and conversations only the answers count (:func:`hylorada_jax.data.answers.score_answers`).

    Args:
        examples: from :func:`load_documents`.
        tokenizer: the model's, from :func:`load_tokenizer`.
        structure: the documents' domain, for a model with a structure encoder: "code", Python source, whose
            ``structure_ids`` are nesting depths (:func:`hylorada_jax.structure.code.character_depths`), 0 for
            a token that stands for no character, and in a conversation for all but its blocks of code; None
            for no structure.
        score: "answers", "last" or "all".
        skipped: gets the errors of rows that cannot be tokenized, which are left out; None raises the first.

    Returns:
        The documents, in the order of the examples: one of each, none where nothing in it counts, or several
        where a template splits a conversation's turns.

    Raises:
        ConfigError: the domain, or what is scored, is unknown.
        DataError: conversations for a model without a chat template, or one that its template refuses; or
            something else than :func:`load_documents` returns.

    Warns:
        UserWarning: documents do not parse, so that their depths are those of their indentation; it names
            them.

    Example:
        tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
    """
    require_one_of("score", score, get_args(Score))
    examples = _checked(examples)
    unparsed: list[str] = []
    found = _tokenized(examples, tokenizer, structure, score, skipped, unparsed)
    documents = [document for each in found for document in each or ()]
    _warn(unparsed, examples)
    return documents


def prepare(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    structure: Domain | None = None,
    score: Score = "answers",
    overlength: Overlength = "truncate",
    skipped: list[DataError] | None = None,
    keep: bool = False,
) -> tuple[list[TokenizedDocument], Counts]:
    """Documents for rows of a length: :func:`tokenize`, and what becomes of those that are longer.

    Args:
        examples: from :func:`load_documents`.
        tokenizer: the model's.
        seq_len: tokens of a row.
        structure, score, skipped: as in :func:`tokenize`.
        overlength: for a completion or conversation of more than seq_len + 1 tokens, the last of which is
            only predicted: "truncate" cuts the rest, "drop" drops the row, and "error" raises.
            Texts are cut into windows, and none is too long.
        keep: keep the result on disk, and take it from there where the same was asked for before
            (:mod:`hylorada_jax.data.cache`).

    Returns:
        The records, and the counts of what happened.

    Raises:
        ConfigError: as :func:`tokenize`; or ``overlength`` is unknown, or a row has no token.
        DataError: as :func:`tokenize`; or a row is too long.

    Example:
        prepare(load_documents("chats.jsonl"), load_tokenizer("smollm2-135m"), seq_len=512)
    """
    require_one_of("score", score, get_args(Score))
    require_one_of("overlength", overlength, get_args(Overlength))
    check_windows(seq_len)
    examples = _checked(examples)
    options = {"seq_len": seq_len, "structure": structure, "score": score, "overlength": overlength}
    key = cache.key_of(examples, tokenizer, options) if keep and cache.directory() else ""
    if key and (found := cache.read(key)):
        documents, (counts, unparsed) = found
    else:
        bad: list[DataError] | None = None if skipped is None else []
        with _without_old_garbage():
            documents, counts, unparsed = _prepared(
                examples, tokenizer, seq_len, structure, score, overlength, bad
            )
        if skipped is not None and bad:  # what is left out is listed each time
            skipped += bad
        elif key:
            cache.write(key, documents, [counts, unparsed])
    _warn(unparsed, examples)
    return documents, Counts(*counts)


@contextlib.contextmanager
def _without_old_garbage() -> Iterator[None]:
    """Garbage is looked for among new objects only: all of them, JAX's too, took a quarter of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _prepared(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    seq_len: int,
    structure: Domain | None,
    score: Score,
    overlength: Overlength,
    skipped: list[DataError] | None,
) -> tuple[list[TokenizedDocument], Counts, list[str]]:
    """The records, their counts, and the names of what does not parse."""
    kept: list[TokenizedDocument] = []
    unparsed: list[str] = []
    unscored = too_long = truncated = 0
    found = _tokenized(examples, tokenizer, structure, score, skipped, unparsed)
    for example, documents in zip(examples, found, strict=True):
        if documents is None:
            continue
        long = [d for d in documents if len(d) > seq_len + 1 and not isinstance(example, Document)]
        if long and overlength == "error":
            raise DataError(
                f"A row must fit into {seq_len} tokens.",
                f"{long[0].name}: {len(long[0]) - 1}",
                "Take a larger seq_len, or truncate or drop what is longer.",
            )
        if long and overlength == "drop":
            too_long += 1
            continue
        if long:
            documents = [_cut(d, seq_len + 1) if d in long else d for d in documents]
            truncated += len(long)
        documents = [d for d in documents if _scored(d)]
        unscored += not documents
        kept += documents
    tokens, scored = sum(map(len, kept)), sum(map(_scored, kept))
    return kept, Counts(len(examples), len(kept), tokens, scored, unscored, too_long, truncated), unparsed


def _scored(document: TokenizedDocument) -> int:
    """The predictions of a document that count."""
    return max(0, len(document) - 1) if document.scored is None else int(document.scored[1:].sum())


def _cut(document: TokenizedDocument, length: int) -> TokenizedDocument:
    fields = {
        name: values[:length] for name, values in vars(document).items() if isinstance(values, np.ndarray)
    }
    return TokenizedDocument(**fields, name=document.name)


def _tokenized(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    structure: Domain | None,
    score: Score,
    skipped: list[DataError] | None,
    unparsed: list[str],
) -> Iterator[list[TokenizedDocument] | None]:
    """The records of each example, or None where its error was put into ``skipped``."""
    if structure not in (None, "code"):
        remedy = "Make the ids of other domains yourself: TokenizedDocument(tokens, structure_ids=…)."
        raise ConfigError("structure must be code.", repr(structure), remedy)
    texts = _texts([example for example in examples if isinstance(example, Document)], tokenizer)
    others = [example for example in examples if not isinstance(example, Document)]
    # Closed, it has ended its thread, also where a row is refused.
    with contextlib.closing(
        score_answers(others, tokenizer, score, offsets=structure is not None)
    ) as answers:
        for example in examples:
            found = next(texts if isinstance(example, Document) else answers)
            if isinstance(found, DataError):
                if skipped is None:
                    raise found
                skipped.append(found)
                yield None
                continue
            missed: list[str] = []  # once for each part
            yield [
                _record(
                    example,
                    scored,
                    "" if len(found) == 1 else f", part {part}",
                    tokenizer,
                    structure,
                    missed,
                )
                for part, scored in enumerate(found, start=1)
            ]
            unparsed += missed[:1]


def _checked(examples: Iterable[Example]) -> list[Example]:
    found = [*examples]
    for at, example in enumerate(found):
        if not isinstance(example, Example):
            raise DataError(
                "Examples must be Documents, Completions or Conversations, as load_documents returns them.",
                f"{shown(example)} at {at}",
                'Read rows of your own too: load_documents([{"text": …}]).',
            )
    return found


def _warn(unparsed: Sequence[str], examples: Sequence[Example]) -> None:
    if unparsed:
        count = f"{len(unparsed)} of {len(examples)} documents do not parse: depth by indentation"
        warnings.warn(f"structure: {count}, {short(unparsed)}", stacklevel=3)


def _texts(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[Scored]]:
    remaining = iter(documents)
    while batch := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer.encode_documents([document.text for document in batch])
        for document, (ids, offsets) in zip(batch, encoded, strict=True):
            yield [Scored(ids, [True] * len(ids), offsets, document.text)]


def conversation_depths(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[np.ndarray, bool]:
    """:func:`fenced_depths` of a conversation as a template writes it, its messages between special tokens.

    Args:
        text: what the template gave.
        ids: its tokens.
        offsets: the characters [start, stop) of each of them.
        tokenizer: that made them.
    """
    return fenced_depths(text, offsets, [token in tokenizer.special_ids for token in ids])


def _record(
    example: Example,
    scored: Scored,
    part: str,
    tokenizer: Tokenizer,
    structure: str | None,
    unparsed: list[str],
) -> TokenizedDocument:
    depths = None
    if structure == "code":
        if isinstance(example, Conversation):
            depths, parses = conversation_depths(scored.text, scored.ids, scored.offsets, tokenizer)
        else:
            depths, parses = token_depths(scored.text, scored.offsets)
        if not parses:
            unparsed.append(example.name)
    return TokenizedDocument(
        np.array(scored.ids, np.int32),
        scored=None if all(scored.scored) else np.array(scored.scored, bool),
        structure_ids=depths,
        name=f"{example.name}{part}",
    )
