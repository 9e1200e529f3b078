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
from hylorada_jax.models.tokenizer_settings import MAX_TOKEN, REMEDY, RULE

_MAX_BYTES = 2**26
"""Twice Gemma 3's tokenizer.json."""
_MAX_STEPS = 100
"""Eight times ALBERT's."""
_MAX_GROWTH = 2**13
"""How many times as long as a text its normalisation, its pieces or its ids may become; ALBERT: 2178."""
_MAX_DECODED = 2**4
"""How many times as long as its tokens a decoded text may become; T5: 3."""
_MAX_PROCESSOR = 2**16
"""Bytes of what adds special tokens to each text; Llama 3: 500."""
_MAX_WORD = 1000
"""Ten times BERT's."""
_MAX_ID = 2**24 - 1
"""The last of the largest embedding (``models.bounds``)."""

# The factors of steps that have no text of their own; those of the normal forms are Unicode's.
_GROWTH = {"ByteLevel": 2, "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "BertNormalizer": 5}


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


def read_backend(file: Path, *, prefix: bool = True) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json.

    What would exhaust the process while it is read, at the first text or at the first answer, is refused
    before the library uses it, and the library gets what was checked, so that both read the same of a key
    that occurs twice.

    Args:
        file: of a tokenizer.
        prefix: with what puts a space in front of a text, and takes it off again in decoding.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it cannot be read, is larger than 64 MiB, or describes no tokenizer that works.
    """
    content = read_bounded(file, RULE, ModelError, REMEDY, limit=_MAX_BYTES)
    try:
        saved = msgspec.json.decode(content, type=_File)
        encoding = [*_steps(saved.normalizer), *_steps(saved.pre_tokenizer), *_steps(saved.post_processor)]
        decoding = [*_steps(saved.decoder)]
        if (count := len(encoding) + len(decoding)) > _MAX_STEPS:
            raise ValueError(f"{count:,} steps, of at most {_MAX_STEPS}")
        if (size := len(msgspec.json.encode(saved.post_processor))) > _MAX_PROCESSOR:
            raise ValueError(f"a post_processor of {size:,} bytes, of at most {_MAX_PROCESSOR:,}")
        growths = (math.prod(map(_growth, steps)) for steps in (encoding, decoding))
        for growth, limit in zip(growths, (_MAX_GROWTH, _MAX_DECODED), strict=True):
            if growth > limit:
                raise ModelError(
                    f"The steps of a tokenizer must not lengthen a text more than {limit:,} times.",
                    f"{file}: up to {growth:,.0f} times",
                    "Take another model.",
                )
        if not prefix:
            _take_prefix_off(saved)
        content = msgspec.json.encode(saved)
    except ModelError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ModelError(RULE, f"{file}: {error}", REMEDY) from error
    with refusing(file):
        backend = tokenizers.Tokenizer.from_str(content.decode())
    _check_model(backend, file)
    return backend


def has_gaps(backend: tokenizers.Tokenizer) -> bool:
    """Whether ids below the largest are no token's: where it is saved, the library prints each to stdout."""
    ids = {*backend.get_vocab(with_added_tokens=False).values()}
    return len(ids) <= max(ids, default=-1)


def _check_model(backend: tokenizers.Tokenizer, file: Path) -> None:
    model, vocabulary = backend.model, backend.get_vocab()
    if isinstance(model, models.WordPiece) and model.max_input_chars_per_word > _MAX_WORD:
        raise ModelError(
            f"A WordPiece model must take words of up to {_MAX_WORD} characters, for its time is their cube.",
            f"{file}: max_input_chars_per_word {model.max_input_chars_per_word:,}",
            REMEDY,
        )
    around = [
        getattr(model, name, None) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")
    ]
    if (longest := max(map(len, [*vocabulary, *around]))) > MAX_TOKEN:
        rule = f"A token must have at most {MAX_TOKEN:,} characters."
        raise ModelError(rule, f"{file}: one of {longest:,}", REMEDY)
    if (last := max(vocabulary.values(), default=0)) > _MAX_ID:
        raise ModelError(f"The id of a token must be at most {_MAX_ID:,}.", f"{file}: {last:,}", REMEDY)


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """A step of tokenizer.json, and those that it is a sequence of.

    The library takes a list of its values for a step too, which none has written.
    """
    if step is None:
        return
    if not isinstance(step, dict):
        raise ValueError("a step of a tokenizer that is not an object")
    yield step
    for plural in ("normalizers", "pretokenizers", "processors", "decoders"):
        if isinstance(steps := step.get(plural), list):
            for each in steps:
                yield from _steps(each)


def _growth(step: dict[str, Any]) -> float:
    """At most by which factor a step lengthens a text in UTF-8, but for those that it is a sequence of.

    Every key counts, for without a type the library goes by any of them. What is of a wrong type is left to
    the library, which refuses it.
    """
    kind = step.get("type")
    growth = float(_GROWTH.get(kind, 1) if isinstance(kind, str) else 1)
    if isinstance(content := step.get("content"), str):
        growth *= _replacing(step.get("pattern"), len(content.encode()))
    if isinstance(replacement := step.get("replacement"), str):
        growth *= max(1, len(replacement.encode()))
    if isinstance(prepended := step.get("prepend"), str):
        growth *= 1 + len(prepended.encode())
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        growth *= _longest(charsmap)
    if isinstance(pieces := step.get("single"), list):
        texts = sum("Sequence" in piece for piece in pieces if isinstance(piece, dict))
        growth *= max(1, texts, (len(pieces) - texts) * _most_ids(step.get("special_tokens")))
    return growth


def _replacing(pattern: Any, length: int) -> float:
    """The growth where a text of this length replaces each match, of which one may have no length."""
    match pattern:
        case {"String": str(text), **rest} if text and not rest:
            return max(1, length / len(text.encode()))
    return 1 + length


def _longest(charsmap: str) -> int:
    """Bytes of the longest text that a table of SentencePiece puts in the place of a character."""
    table = base64.b64decode(charsmap)
    # It begins with the size of an index, for which the library makes room before it looks further.
    size = int.from_bytes(table[:4], "little")
    if size > len(table):
        raise ValueError(f"a precompiled_charsmap of {len(table):,} bytes for {size:,}")
    return max(1, *map(len, table[4 + size :].split(b"\0")))


def _most_ids(special_tokens: Any) -> int:
    """Of the special tokens of a template, each an object or a list of its values, the most ids of one."""
    given = [*special_tokens.values()] if isinstance(special_tokens, dict) else []
    values = [[*token.values()] if isinstance(token, dict) else token for token in given]
    parts = [part for each in values if isinstance(each, list) for part in each]
    return max((len(part) for part in parts if isinstance(part, list)), default=0)


def _take_prefix_off(saved: _File) -> None:
    for part, plural, dropped in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        step = getattr(saved, part) or {}
        steps = each if isinstance(each := step.get(plural), list) else [step]
        kept = [each for each in steps if each and each.get("type") != dropped]
        setattr(saved, part, {"type": "Sequence", plural: kept})
        for each in [saved.pre_tokenizer, *kept]:
            if each and each.get("type") == "Metaspace":
                each["prepend_scheme"] = "never"
