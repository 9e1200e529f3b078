"""One record per document: its tokens, which of them are scored, and what is known of each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hylorada_jax.config import READS_STRUCTURE
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models.ids import INT32, outside

STRUCTURE = ("structure_ids", "structure_positions")
"""The fields of a document that a structure encoder reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as models read it, from :func:`tokenize` or your own.

    ``len`` is the number of its tokens, n.

    Attributes:
        tokens: token ids, int32 [n].
        scored: whether a token counts where it is predicted, in training and in evaluation, bool [n]; None
            for all. In a conversation the answers do and the prompts do not.
        structure_ids: what a structure encoder reads of each token, such as a nesting depth or the importance
            of a graph's node, int32 [n]; None for nothing.
        structure_positions: where each token stands for that encoder, such as calendar hours, float32 [n];
            None for its place in the document, or in the window of it that a row has.
        name: where the document came from.

    Example:
        >>> from hylorada_jax.structure.time import calendar_positions
        >>> hours = calendar_positions(["2024-05-01T06:00", "2024-05-01T07:30"])
        >>> len(TokenizedDocument(np.array([7, 5]), structure_positions=hours))
        2
    """

    tokens: np.ndarray
    scored: np.ndarray | None = None
    structure_ids: np.ndarray | None = None
    structure_positions: np.ndarray | None = None
    name: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def has_structure(self) -> bool:
        """Whether there is something in it for a structure encoder."""
        return any(getattr(self, name) is not None for name in STRUCTURE)

    def without_structure(self) -> TokenizedDocument:
        """The same for a model that has no structure encoder."""
        return TokenizedDocument(self.tokens, self.scored, name=self.name)


def digest(documents: Sequence[TokenizedDocument]) -> str:
    """A fingerprint: equal for documents of equal tokens, scores and structure in equal order."""
    sha = hashlib.sha256()
    for document in documents:
        sha.update(len(document).to_bytes(8, "little"))
        sha.update(np.ascontiguousarray(document.tokens, np.int32).tobytes())
        for name in ("scored", *STRUCTURE):
            if (values := getattr(document, name)) is not None:
                sha.update(name.encode() + values.tobytes())
    return sha.hexdigest()


def as_record(document: Any) -> TokenizedDocument:
    """The record of a document, which may also be its bare token ids."""
    return document if isinstance(document, TokenizedDocument) else TokenizedDocument(document)


def as_documents(data: Sequence[Any], vocab: int, what: str, *, has_encoder: bool) -> list[TokenizedDocument]:
    """Tokenized documents, checked.

    Args:
        data: a :class:`TokenizedDocument` or a sequence of token ids per document.
        vocab: number of ids the model has.
        what: how an error calls the data.
        has_encoder: the model has a structure encoder.

    Returns:
        Records with arrays of the dtypes of their fields.

    Raises:
        DataError: a document is not a sequence of ids, an id is outside the vocabulary, a field does not fit
            the tokens, only some documents have structure, or nothing can be predicted: no document has two
            tokens, or none of them is scored.
        ConfigError: nothing in the model reads structure.
    """
    documents = [_checked(as_record(each), number, vocab, what) for number, each in enumerate(data)]
    for name in STRUCTURE:
        having = sum(getattr(document, name) is not None for document in documents)
        if having and not has_encoder:
            raise ConfigError(
                READS_STRUCTURE,
                f"{name} of the {what} data, for a model without one",
                "Choose method='hylorada_v2', or give no structure.",
            )
        if 0 < having < len(documents):
            rule = f"All documents of the {what} data must have {name}, or none."
            raise DataError(rule, f"{having} of {len(documents)} documents", "Give each of them its own.")
    check_predicted(documents, f"The {what} data")
    return documents


def check_predicted(documents: Sequence[TokenizedDocument], what: str) -> None:
    """Raises a DataError, with ``what`` in front, for documents in which no prediction counts."""
    if not documents:
        remedy = "Give text, or answers of an assistant; if rows are too short for these, a larger --seq-len."
        raise DataError(
            f"{what} must have a document.", "0 documents, without those that are empty or left out", remedy
        )
    predicted = [document for document in documents if len(document) > 1]
    if not predicted:
        rule = f"{what} must have a document of at least two tokens."
        raise DataError(rule, f"{len(documents)} documents, none of two tokens", "Give more text.")
    if not any(document.scored is None or document.scored[1:].any() for document in predicted):
        rule = f"{what} must have a scored token that has another one before it."
        raise DataError(rule, f"{len(documents)} documents without one", "Score what is to be predicted.")


def _checked(document: TokenizedDocument, number: int, vocab: int, what: str) -> TokenizedDocument:
    ids = _array(document.tokens)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        rule = f"Every document of the {what} data must be a sequence of token ids."
        received = f"document {number}: {ids.dtype} of shape {ids.shape}"
        raise DataError(rule, received, "Tokenize texts first: tokenize(load_documents(…), tokenizer).")
    if ids.size and (wrong := outside(ids, vocab)):
        rule = f"Every token id of the {what} data must be in the model's vocabulary, 0 … {vocab - 1}."
        raise DataError(rule, f"document {number}: {wrong}", "Use the model's own tokenizer.")

    def field(name: str, dtype: type, kind: str, fault: Callable[[np.ndarray], str]) -> np.ndarray | None:
        if (given := getattr(document, name)) is None:
            return None
        values = _array(given)
        if values.shape != ids.shape:
            wrong = f"{values.dtype} of shape {values.shape}"
        else:
            wrong = fault(values) if values.size else ""
        if wrong:
            rule = f"{name} of the {what} data must be {kind}, one for each token."
            received = f"document {number}: {wrong}, for {len(ids)} tokens"
            raise DataError(rule, received, "Make it from the same text as the tokens.")
        return values.astype(dtype, copy=False)

    return TokenizedDocument(
        ids.astype(np.int32, copy=False),  # there is no second copy of all data
        field("scored", np.bool_, "bools", lambda values: "" if values.dtype == bool else str(values.dtype)),
        field("structure_ids", np.int32, "integers ≥ 0", lambda values: outside(values, INT32)),
        field("structure_positions", np.float32, "finite numbers", _not_finite),
        document.name,
    )


def _not_finite(values: np.ndarray) -> str:
    """What of some values is not a number that float32 has; "" where all are."""
    if values.dtype.kind not in "iuf":
        return str(values.dtype)
    beyond = ~(np.abs(values) <= np.finfo(np.float32).max)  # NaN is not less than anything
    return f"{values[beyond][0]}" if beyond.any() else ""


def _array(values: Any) -> np.ndarray:
    """The values as an array; of objects where they are rows of several lengths."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.asarray(values, object)
