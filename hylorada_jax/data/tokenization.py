"""Texts as tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.text_files import Document
from hylorada_jax.errors import ConfigError
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.structure.code import Domain, token_depths
from hylorada_jax.text import short

_DOCUMENTS_AT_ONCE = 64


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, structure: Domain | None = None
) -> list[TokenizedDocument]:
    """The tokens of each document, with what the tokenizer's template adds and the token that ends a text.

    Args:
        documents: from :func:`load_documents`.
        tokenizer: the model's, from :func:`load_tokenizer`; truncation and padding are switched off in it.
        structure: the documents' domain, for a model with a structure encoder: "code", Python source, whose
            ``structure_ids`` are nesting depths (:func:`hylorada_jax.structure.code.character_depths`), 0 for
            a token that stands for no character; None for no structure.

    Returns:
        A record per document.

    Raises:
        ConfigError: the domain is unknown.

    Warns:
        UserWarning: documents do not parse, so that their depths are those of their indentation; it names
            them.

    Example:
        tokenize(load_documents("python-stdlib", "eval"), load_tokenizer("smollm2-135m"))
    """
    if structure not in (None, "code"):
        remedy = "Make the ids of other domains yourself: TokenizedDocument(tokens, structure_ids=…)."
        raise ConfigError("structure must be code.", repr(structure), remedy)
    found, unparsed = [], []
    for document, ids, offsets in _encode(documents, tokenizer):
        depths = None
        if structure == "code":
            depths, parses = token_depths(document.text, offsets)
            if not parses:
                unparsed.append(document.name)
        tokens = np.array(ids, np.int32)
        found.append(TokenizedDocument(tokens, structure_ids=depths, name=document.name))
    if unparsed:
        count = f"{len(unparsed)} of {len(documents)} documents do not parse: depth by indentation"
        warnings.warn(f"structure: {count}, {short(unparsed)}", stacklevel=2)
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
