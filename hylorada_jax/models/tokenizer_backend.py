"""The tokenizers library, with its failures as ours, and tokenizer.json as it may be given to it."""

import base64
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import models

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import read_bounded
from hylorada_jax.models.tokenizer_settings import REMEDY, RULE

_MAX_BYTES = 2**26
"""Twice Gemma 3's tokenizer.json."""
_MAX_GROWTH = 2**10
"""How many times as long as a text its normalisation, its pieces or its ids may become; Llama 2: 3."""
_MAX_WORD = 1000
"""Ten times BERT's."""


class _File(msgspec.Struct, omit_defaults=True):
    """tokenizer.json; of the model, which holds the vocabulary, only its place."""

    model: msgspec.Raw
    version: Any = None
    truncation: Any = None
    padding: Any = None
    added_tokens: Any = None
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


@contextmanager
def refusing(where: object = "the tokenizers library") -> Iterator[None]:
    """Within it, what the tokenizers library raises on a tokenizer that does not work is a ModelError.

    The library raises the bare Exception, or panics: that is pyo3's PanicException, which is no Exception and
    cannot be imported; or a text of the files is half a character.

    Args:
        where: the tokenizer's place, for the error.

    Example:
        >>> with refusing("tokenizer.json"):
        ...     tokenizers.Tokenizer.from_str("{}")
        Traceback (most recent call last):
        hylorada_jax.errors.ModelError: A tokenizer's files must be complete JSON, as transformers writes ...
    """
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"
        if not panicked and not isinstance(error, UnicodeError) and type(error) is not Exception:
            raise
        raise ModelError(RULE, f"{where}: {error}", REMEDY) from error


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json.

    What would exhaust the process while it is read, or at the first text, is refused before the library has
    it, and the library gets what was checked, so that both read the same of a key that occurs twice.

    Args:
        file: of a tokenizer.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it cannot be read, is larger than 64 MiB, or describes no tokenizer that works.
    """
    content = read_bounded(file, RULE, ModelError, REMEDY, limit=_MAX_BYTES)
    try:
        saved = msgspec.json.decode(content, type=_File)
        encoding = _growth(saved.normalizer) * _growth(saved.pre_tokenizer) * _growth(saved.post_processor)
        growth = max(encoding, _growth(saved.decoder))
        content = msgspec.json.encode(saved)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ModelError(RULE, f"{file}: {error}", REMEDY) from error
    if growth > _MAX_GROWTH:
        raise ModelError(
            f"The steps of a tokenizer must not lengthen a text more than {_MAX_GROWTH} times.",
            f"{file}: up to {growth:,} times",
            "Take another model.",
        )
    with refusing(file):
        backend = tokenizers.Tokenizer.from_str(content.decode())
    if isinstance(backend.model, models.WordPiece) and backend.model.max_input_chars_per_word > _MAX_WORD:
        raise ModelError(
            f"A WordPiece model must take words of up to {_MAX_WORD} characters, for its time is their cube.",
            f"{file}: max_input_chars_per_word {backend.model.max_input_chars_per_word:,}",
            REMEDY,
        )
    return backend


def _growth(step: Any) -> int:
    """At most by which factor a step of tokenizer.json, or a sequence of them, lengthens a text.

    What is of a wrong type is left to the library, which refuses it.
    """
    match step:
        case (
            {"normalizers": [*steps]}
            | {"pretokenizers": [*steps]}
            | {"processors": [*steps]}
            | {"decoders": [*steps]}
        ):
            return math.prod(map(_growth, steps))
        case {"pattern": _, "content": str(content)}:
            return max(1, len(content.encode()))
        case {"type": "ByteLevel"}:
            return 2
        case {"type": "TemplateProcessing", "single": [*pieces]}:
            return max(1, sum("Sequence" in piece for piece in pieces if isinstance(piece, dict)))
        case {"precompiled_charsmap": str(charsmap)}:
            # It begins with the size of a table, for which the library makes room before it looks further.
            size = int.from_bytes(base64.b64decode(charsmap[:8])[:4], "little")
            if size > len(charsmap):
                raise ValueError(f"a precompiled_charsmap of {len(charsmap):,} characters for {size:,} bytes")
    return 1
