"""What comes from outside: text that UTF-8 can write; JSON, with one kind of error; values cut for errors."""

import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def well_formed(text: str) -> str:
    """The text with U+FFFD in place of every lone surrogate, which is half a character and has no UTF-8.

    JSON may escape one ("\\ud83d", a cut emoji), and Python gives one for each byte of an argument or a file
    name that is not UTF-8. The length stays, so that offsets into the text do too.

    Args:
        text: any str.

    Returns:
        A str that every tokenizer, hash and file takes.

    Example:
        >>> well_formed("cut emoji \\ud83d") == "cut emoji \\ufffd"
        True

    Source: The Unicode Standard, section 3.9, U+FFFD substitution; JavaScript's ``String.toWellFormed``.
    """
    return _SURROGATE.sub("\ufffd", text)


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says.

    Args:
        text: JSON, with or without a byte order mark.
        pairs: makes the value of an object, of whose keys some may be there twice; None: a dict of the last.

    Returns:
        Python's equivalent.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has an integer of more digits than Python reads.

    Example:
        >>> parse_json('\\ufeff{"text": "a"}')
        {'text': 'a'}
    """
    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_json(value: Any) -> str:
    """A line of JSON, which has no infinity and no NaN: null stands for them.

    Args:
        value: dicts, lists and tuples of plain values.

    Example:
        >>> to_json({"perplexity": float("inf"), "tokens": [3]})
        '{"perplexity": null, "tokens": [3]}'
    """
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def shown(value: object) -> str:
    """A value from outside as an error shows it: its repr, cut in length and, lest it recurse, in depth.

    Args:
        value: of any type, size and depth.

    Example:
        >>> shown(0.5), shown("x" * 1000)[:4], len(shown("x" * 1000))
        ('0.5', "'xxx", 80)
    """
    return _SHORT.repr(value)


def cut(text: str, length: int) -> str:
    """The beginning of a text that is longer than a message has room for.

    Example:
        >>> cut("abc", 3), cut("abcd", 3)
        ('abc', 'abc…')
    """
    return text if len(text) <= length else f"{text[:length]}…"


def short(names: Sequence[str]) -> str:
    """The first names of a long list, and how many more there are."""
    first = ", ".join(cut(name, 200) for name in names[:8])
    return (first + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "none"
