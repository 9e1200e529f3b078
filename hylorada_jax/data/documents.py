"""From documents to batches: tokens, and a shuffled, repeating, checkpointable iterator over rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from hylorada_jax.data.packing import Batch, Rows
from hylorada_jax.data.text_files import Document
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models.ids import INT32, outside
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.structure.code import token_depths

_DOCUMENTS_AT_ONCE = 64
_ENDLESS = 2**50  # rows; more than anybody trains on


class StructuredDocuments(NamedTuple):
    """Tokenized documents with what their domain knows of each token.

    Attributes:
        tokens: one int32 array per document.
        structure_ids: of the same lengths.
        unparsed: names of the documents whose structure could not be read and was taken from indentation.
    """

    tokens: list[np.ndarray]
    structure_ids: list[np.ndarray]
    unparsed: list[str]


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each document, with what the tokenizer's template adds and the token that ends a text.

    Args:
        documents: from :func:`load_documents`.
        tokenizer: the model's, from :func:`load_tokenizer`; truncation and padding are switched off in it.

    Returns:
        One int32 array per document.

    Example:
        tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
    """
    return [np.array(ids, np.int32) for _, ids, _ in _encode(documents, tokenizer)]


def tokenize_with_structure(
    documents: Sequence[Document], tokenizer: Tokenizer, structure: Literal["code"] = "code"
) -> StructuredDocuments:
    """Token ids of each document, as :func:`tokenize` gives them, and their structure ids.

    Args:
        documents: from :func:`load_documents`.
        tokenizer: the model's.
        structure: the documents' domain: "code", Python source, whose ids are nesting depths
            (:func:`hylorada_jax.structure.code.character_depths`). Tokens that stand for no character, such
            as the one that ends a text, have the id 0.

    Returns:
        The tokens, their ids, and the names of the documents that do not parse.

    Raises:
        ConfigError: the domain is unknown.

    Example:
        tokenize_with_structure(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
    """
    if structure != "code":
        raise ConfigError(
            "structure must be code", repr(structure), "Make the ids of other domains yourself."
        )
    found = StructuredDocuments([], [], [])
    for document, ids, offsets in _encode(documents, tokenizer):
        depths, parses = token_depths(document.text, offsets)
        found.tokens.append(np.array(ids, np.int32))
        found.structure_ids.append(depths)
        if not parses:
            found.unparsed.append(document.name)
    return found


def _encode(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int], list[tuple[int, int]]]]:
    """Each document with its token ids and the characters [start, stop) that they stand for."""
    # Many tokenizer.json files carry the truncation of somebody's training run.
    tokenizer.backend.no_truncation()
    tokenizer.backend.no_padding()
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        batch = documents[first : first + _DOCUMENTS_AT_ONCE]
        encoded = tokenizer.encode_documents([document.text for document in batch])
        for document, (ids, offsets) in zip(batch, encoded, strict=True):
            yield document, ids, offsets


def digest(documents: Sequence[np.ndarray]) -> str:
    """A fingerprint of tokenized documents: equal for equal documents in equal order."""
    sha = hashlib.sha256()
    for tokens in documents:
        sha.update(len(tokens).to_bytes(8, "little"))
        sha.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    return sha.hexdigest()


def as_documents(data: Sequence[Any], vocab: int, what: str) -> list[np.ndarray]:
    """Tokenized documents as int32 arrays, checked.

    Args:
        data: one sequence of token ids per document.
        vocab: number of ids the model has.
        what: how an error calls the data.

    Returns:
        One [n] int32 array per document.

    Raises:
        DataError: a document is not a sequence of ids, an id is outside the vocabulary, or nothing can be
            predicted: no document has two tokens.
    """
    documents = []
    for number, tokens in enumerate(data):
        ids = _array(tokens)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            rule = f"Every document of the {what} data must be a sequence of token ids"
            received = f"document {number}: {ids.dtype} of shape {ids.shape}"
            raise DataError(rule, received, "Tokenize texts first: tokenize(load_documents(…), tokenizer).")
        if ids.size and (wrong := outside(ids, vocab)):
            rule = f"Every token id of the {what} data must be in the model's vocabulary, 0 … {vocab - 1}"
            raise DataError(rule, f"document {number}: {wrong}", "Use the model's own tokenizer.")
        documents.append(ids.astype(np.int32))
    if all(len(ids) < 2 for ids in documents):
        rule = f"The {what} data must have a document of at least two tokens"
        raise DataError(rule, f"{len(documents)} documents, none of two tokens", "Give more text.")
    return documents


def as_structure(
    structure: Sequence[Any] | None, documents: Sequence[np.ndarray], what: str, *, has_encoder: bool
) -> list[np.ndarray] | None:
    """Structure ids as int32 arrays, checked; None where there are none.

    Args:
        structure: one sequence of ids per document, or None.
        documents: from :func:`as_documents`.
        what: how an error calls the data.
        has_encoder: the model has a structure encoder, which reads the ids.

    Returns:
        One [n] int32 array per document.

    Raises:
        ConfigError: nothing in the model reads the ids.
        DataError: a document has no ids, more or fewer than tokens, or one that is no integer ≥ 0.
    """
    if structure is None:
        return None
    if not has_encoder:
        raise ConfigError(
            "Structure ids need a model with a structure encoder",
            f"structure of the {what} data, for a model without one",
            "Choose method='hylorada_v2', or give no structure.",
        )
    if len(structure) != len(documents):
        rule = f"Every document of the {what} data must have its structure ids"
        received = f"{len(structure)} sequences of ids for {len(documents)} documents"
        raise DataError(rule, received, "Make both from the same documents: tokenize_with_structure(…).")
    arrays = [_array(ids) for ids in structure]
    for number, (ids, tokens) in enumerate(zip(arrays, documents, strict=True)):
        integers = not ids.size or not outside(ids, INT32)
        if ids.shape != tokens.shape or not integers:
            rule = f"Structure ids of the {what} data must be integers ≥ 0, one for each token"
            received = f"document {number}: {ids.dtype} of shape {ids.shape}, for {len(tokens)} tokens"
            if np.issubdtype(ids.dtype, np.integer) and not integers:
                received += f", from {ids.min()} to {ids.max()}"
            raise DataError(rule, received, "Make both from the same text: tokenize_with_structure(…).")
    return [ids.astype(np.int32) for ids in arrays]


def _array(values: Any) -> np.ndarray:
    """The values as an array; of objects where they are rows of several lengths."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.asarray(values, object)


def shuffled_batches(
    rows: Rows | Sequence[Batch], batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Batches without end: every epoch has each row once, in an order of its own.

    Args:
        rows: what to draw from.
        batch_size: rows per batch; a batch may reach over the end of an epoch.
        seed: of the order.

    Returns:
        An iterator with ``get_state`` and ``set_state``; a batch also has ``row``, the rows' numbers [batch].
    """

    def numbered(index: int) -> Batch:
        return {**rows[index], "row": np.array(index, np.int32)}

    # Not repeat() without a number: grain then divides the largest int by the batch size in floating point,
    # which overflows for a batch of one.
    epochs = _ENDLESS // len(rows) + 1
    order = grain.MapDataset.range(len(rows)).shuffle(seed=seed)
    dataset = order.map(numbered).repeat(epochs).batch(batch_size)
    # Making a row takes microseconds: threads would cost more than they save.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
