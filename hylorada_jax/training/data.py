"""From documents to batches: tokens, and a shuffled, repeating, checkpointable iterator over rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from hylorada_jax.errors import DataError
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.training.corpus import Document
from hylorada_jax.training.packing import Batch, Rows

_DOCUMENTS_AT_ONCE = 64
_ENDLESS = 2**50  # rows; more than anybody trains on


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each document, with what the tokenizer's template adds and the token that ends a text.

    Args:
        documents: from :func:`load_documents`.
        tokenizer: the model's, from :func:`load_tokenizer`; truncation and padding are switched off in it.

    Returns:
        One int32 array per document.
    """
    # Many tokenizer.json files carry the truncation of somebody's training run.
    tokenizer.backend.no_truncation()
    tokenizer.backend.no_padding()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = []
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[first : first + _DOCUMENTS_AT_ONCE]]
        for encoding in tokenizer.backend.encode_batch(texts):
            ends_already = encoding.ids[-1:] == end
            tokens.append(np.array(encoding.ids + ([] if ends_already else end), np.int32))
    return tokens


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
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            rule = f"Every document of the {what} data must be a sequence of token ids"
            received = f"document {number}: {ids.dtype} of shape {ids.shape}"
            raise DataError(rule, received, "Tokenize texts first: tokenize(load_documents(…), tokenizer).")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
            rule = f"Every token id of the {what} data must be in the model's vocabulary, 0 … {vocab - 1}"
            received = f"document {number}: {ids.min()} … {ids.max()}"
            raise DataError(rule, received, "Use the model's own tokenizer.")
        documents.append(ids.astype(np.int32))
    if all(len(ids) < 2 for ids in documents):
        rule = f"The {what} data must have a document of at least two tokens"
        raise DataError(rule, f"{len(documents)} documents, none of two tokens", "Give more text.")
    return documents


def shuffled_batches(rows: Rows, batch_size: int, seed: int) -> grain.DatasetIterator[Batch]:
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
