"""What became of rows is kept on disk: a second run over the same data starts at once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from safetensors import safe_open
from safetensors.numpy import save

from hylorada_jax.data.document import STRUCTURE, TokenizedDocument
from hylorada_jax.data.examples import Example
from hylorada_jax.io.files import TEMPORARY, user_path, write_whole
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.models.tokenizer_backend import has_gaps
from hylorada_jax.placement.processes import source_sha256

ROOM = 8 * 2**30
"""Bytes of all that is kept; beyond, what was not used for longest is removed."""
LARGEST = 2**30
"""Bytes of what is kept of one data set: writing takes three times as much memory."""

_OURS = re.compile(rf"[0-9a-f]{{64}}\.safetensors|{TEMPORARY}")
# A document's arrays.
_FIELDS = ("tokens", "scored", *STRUCTURE)


def directory() -> Path | None:
    """Where it is kept: ``HYLORADA_CACHE``, or ``hylorada`` in the user's cache; None for ``off``."""
    if (said := os.environ.get("HYLORADA_CACHE")) == "off":
        return None
    if said:
        return user_path(said) / "tokens"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "hylorada" / "tokens" if os.path.isabs(cache) else None


def key_of(examples: Iterable[Example], tokenizer: Tokenizer, options: Mapping[str, Any]) -> str:
    """A fingerprint of all that decides the tokens of rows.

    That is the rows with their names, the tokenizer and its chat template, the options, the day where the
    template asks for it, and the program: this package's own source, so that no change of it is forgotten,
    and the libraries that it tokenizes and renders with.

    Args:
        examples: the rows.
        tokenizer: the model's.
        options: of what is made of them.

    Returns:
        It; "" for a tokenizer with gaps in its ids, whose JSON cannot be had without their being printed.
    """
    if has_gaps(tokenizer.backend):
        return ""
    today = datetime.date.today() if "strftime_now" in str(tokenizer.chat_template) else None
    names = [field.name for field in dataclasses.fields(tokenizer) if field.name != "backend"]
    decides = {name: getattr(tokenizer, name) for name in names}
    program = source_sha256(), tokenizers.__version__, jinja2.__version__, sys.version_info[:2]
    sha = hashlib.sha256(repr((program, today, decides, dict(options))).encode())
    # The one setting of a tokenizer that is not in its JSON.
    sha.update(f"{tokenizer.backend.encode_special_tokens}{tokenizer.backend.to_str()}".encode())
    for example in examples:
        sha.update(repr(example).encode(errors="backslashreplace"))
    return sha.hexdigest()


def read(key: str) -> tuple[list[TokenizedDocument], Any] | None:
    """The documents that are kept under a key, and what was noted with them.

    Args:
        key: from :func:`key_of`.

    Returns:
        As :func:`write` was given them; None where there are none, or the file is damaged.
    """
    if (path := _path(key)) is None:
        return None
    try:
        with safe_open(path, "numpy") as file:
            digest = file.metadata()["sha256"]
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest != _digest(arrays):
            return None
        records, notes = json.loads(arrays.pop("records").tobytes())
    except Exception:  # whatever damage raises: it is made anew
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used
    at = dict.fromkeys(arrays, 0)
    documents = []
    for name, length, *has in records:
        there = [field for field, given in zip(_FIELDS, has, strict=True) if given]
        fields = {field: arrays[field][at[field] : at[field] + length] for field in there}
        at |= {field: at[field] + length for field in there}
        documents.append(TokenizedDocument(**fields, name=name))
    return documents, notes


def write(key: str, documents: Sequence[TokenizedDocument], notes: Any) -> None:
    """Keeps documents; where they are too large, or nothing can be written, nothing happens.

    Args:
        key: from :func:`key_of`.
        documents: what was made of the rows.
        notes: what else was, of JSON's types.
    """
    path = _path(key)
    columns = {field: [v for d in documents if (v := getattr(d, field)) is not None] for field in _FIELDS}
    if path is None or sum(values.nbytes for column in columns.values() for values in column) > LARGEST:
        return
    arrays = {field: np.concatenate(column) for field, column in columns.items() if column}
    records = [[d.name, len(d), *(getattr(d, field) is not None for field in _FIELDS)] for d in documents]
    arrays["records"] = np.frombuffer(json.dumps([records, notes]).encode(), np.uint8)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(arrays, {"sha256": _digest(arrays)}))
        _make_room(path.parent)


def _path(key: str) -> Path | None:
    place = directory()
    return place and place / f"{key}.safetensors"


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()


def _make_room(place: Path) -> None:
    """Removes what was not used for longest, and nothing that another program wrote."""
    found = [(path.stat(), path) for path in place.iterdir() if _OURS.fullmatch(path.name)]
    left = sum(status.st_size for status, _ in found)
    for status, path in sorted(found, key=lambda each: each[0].st_mtime):
        if left <= ROOM:
            break
        path.unlink(missing_ok=True)  # by another process
        left -= status.st_size
