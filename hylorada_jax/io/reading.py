"""Reading files that strangers wrote: bounded in size, and of the types that they must have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.io import bucket
from hylorada_jax.text import parse_json, shown

MAX_JSON_BYTES = 16 * 2**20
"""Far more than any config or index has; what Python builds of it stays within some hundred MiB."""
NOT_YOURS = "Make it readable (chmod), or ask its owner."
"""The remedy for a file or a directory that the user may not read."""

T = TypeVar("T")


def read_bounded(
    path: Path, rule: str, error: type[HyLoRADAError], remedy: str, *, limit: int = MAX_JSON_BYTES
) -> bytes:
    """The content of a file that is not larger than it may be.

    Args:
        path: of a regular file, a link to one, or a file in a bucket.
        rule: what the file must be, for the error.
        error: the class of the error.
        remedy: for the error.
        limit: in bytes.

    Returns:
        All of it.

    Raises:
        HyLoRADAError: of the class given: it is larger, is not a regular file, or cannot be read.
    """
    try:
        return _read_bounded(path, rule, error, remedy, limit)
    except (OSError, ValueError) as cause:  # a ValueError for a null character in the name
        if isinstance(cause, HyLoRADAError):
            raise
        raise error(rule, *unread(path, cause, remedy)) from cause


def unread(path: Path, cause: Exception, remedy: str) -> tuple[str, str]:
    """What was received in place of a file's content, and the remedy: a copy may be no more readable."""
    received = f"{path}: {getattr(cause, 'strerror', None) or cause}"
    return received, NOT_YOURS if isinstance(cause, PermissionError) else remedy


def _read_bounded(path: Path, rule: str, error: type[HyLoRADAError], remedy: str, limit: int) -> bytes:
    with bucket.answering(path):
        if not path.is_file():  # a directory, a pipe that never ends
            raise error(rule, f"{path}: no such file", remedy)
        size = bucket.size(path) if bucket.is_in_bucket(path) else path.stat().st_size
        if size > limit:
            raise error(rule, f"{path}: {size:,} bytes, more than {limit:,}", remedy)
        return path.read_bytes()


def read_json(
    path: Path,
    rule: str,
    error: type[HyLoRADAError],
    remedy: str = "Download it again.",
    *,
    limit: int = MAX_JSON_BYTES,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of a file in UTF-8, with or without a byte order mark.
        rule: what the file must be, for the error.
        error: the class of the error.
        remedy: for the error.
        limit: in bytes.

    Returns:
        The object, its values of any type: :func:`checked` gives them theirs.

    Raises:
        HyLoRADAError: of the class given: it cannot be read, is too large, or is no JSON object.
    """
    return as_object(read_bounded(path, rule, error, remedy, limit=limit), path, rule, error, remedy)


def as_object(
    content: bytes, path: Path, rule: str, error: type[HyLoRADAError], remedy: str
) -> dict[str, Any]:
    """:func:`read_json` of content that was read."""
    try:
        value = parse_json(content.decode())
    except ValueError as cause:
        raise error(rule, f"{path}: {cause}", remedy) from cause
    if not isinstance(value, dict):
        raise error(rule, f"{path}: a JSON {type(value).__name__}, not an object", remedy)
    return value


def checked(
    value: object, kind: type[T], rule: str, error: type[HyLoRADAError], remedy: str, where: object = ""
) -> T:
    """A value from a file as the type that it must be; nothing is converted, but an int to a float.

    Args:
        value: plain JSON types.
        kind: what msgspec takes, as a ``msgspec.Struct`` with bounds in ``Annotated[int, Meta(ge=1)]``.
        rule: what the value must be, for the error.
        error: the class of the error.
        remedy: for the error.
        where: the file, or the place in it, for the error.

    Returns:
        The value; a Struct with its defaults, without the keys that it does not have.

    Raises:
        HyLoRADAError: of the class given, with the place, the type it must have and the value there.

    Example:
        >>> from hylorada_jax.errors import ModelError
        >>> checked([4, True], list[int], "Depths are integers.", ModelError, "Correct it.", "a.json")
        Traceback (most recent call last):
        hylorada_jax.errors.ModelError: Depths are integers.
          received: a.json: [1]: True (Expected `int`, got `bool`)
          remedy:   Correct it.
    """
    file = f"{where}: " if where else ""
    try:
        return msgspec.convert(value, kind)
    except UnicodeEncodeError as cause:
        found = f"{file}{cause.object!r}: half a character, which has no UTF-8"
        raise error(rule, found, remedy) from cause
    except msgspec.ValidationError as cause:
        expected, _, path = str(cause).partition(" - at `")
        # "[...]" is some value of a dict, "key` in `…" one of its keys.
        place = path.removeprefix("key` in `").removesuffix("`").removeprefix("$").removeprefix(".")
        place = place.replace("[...]", "")
        found = f"{file}{place + ': ' if place else ''}{_at(value, place)} ({expected})"
        raise error(rule, found, remedy) from cause


def _at(value: Any, place: str) -> str:
    """What stands at a place like "rope_parameters.full[0]", as far as it can be found, in short."""
    if isinstance(value, dict) and place in value:  # a key with dots in it, as GGUF's
        value, place = value[place], ""
    try:
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
            value = value[name] if name else value[int(index)]
    except (LookupError, TypeError):
        return "a value"
    return shown(value)
