"""The documents in a file: plain text, or the rows of JSON lines, JSON, CSV or parquet."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hylorada_jax.errors import DataError
from hylorada_jax.text import parse_json, well_formed

COLUMN = "text"
"""The column, or the key of an object, that has a row's text."""

# Bytes of one field; csv's own limit is 131,072, and this is the largest that C has on every platform.
_FIELD_LIMIT = 2**31 - 1


class Document(NamedTuple):
    """One text and where it came from: a file, ``file:line``, or ``file[row]`` where rows are not lines."""

    name: str
    text: str


def read_documents(path: Path) -> Iterator[Document]:
    """The documents in a file, by its suffix in either case.

    ``.jsonl`` and ``.ndjson`` have a JSON object per line; ``.json`` an array of objects, one object, or an
    object per line; ``.csv`` and ``.tsv`` a header and rows (RFC 4180); ``.parquet`` rows. Each row is a
    document, its column ``text`` the text; a row where that is null or blank, and a blank line, gives none.
    Any other file is one document. Text is UTF-8; a byte order mark is dropped, and lone surrogates become
    U+FFFD.

    Args:
        path: a file.

    Yields:
        Documents that are not blank, in the file's order.

    Raises:
        DataError: the file is compressed, damaged or not UTF-8, or a row has no text; it says
            in which line.
    """
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise DataError("A data file must not be compressed", path, f"{_COMPRESSED[suffix]} {path}")
    try:
        for name, text in _READERS.get(suffix, _read_text)(path):
            if text and text.strip():
                yield Document(name, well_formed(text))
    except UnicodeDecodeError as error:
        received = f"{_undecodable(path)}: {error.reason}"
        raise DataError("Text must be UTF-8", received, "Convert the file to UTF-8, with iconv.") from error
    except OSError as error:
        raise DataError("A data file must be readable", f"{path}: {error}", "Check the file.") from error


def _undecodable(path: Path) -> str:
    """Where a file is not UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"{path}:{number}"
    return str(path)


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    yield str(path), path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path) -> Iterator[tuple[str, str | None]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _text_of(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[tuple[str, str | None]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        value = parse_json(text)
    except ValueError as error:
        if getattr(error, "msg", "") != "Extra data":  # behind a whole first value: it is JSON lines
            raise _not_json(f"{path}: {error}") from error
        yield from _read_jsonl(path)
        return
    if not isinstance(value, list):
        value = [value]
    for number, record in enumerate(value):
        yield f"{path}[{number}]", _text_of(record, f"{path}[{number}]")


def _parsed(line: str, place: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise _not_json(f"{place}: {error}") from error


def _not_json(received: str) -> DataError:
    return DataError(
        "JSON must be well formed, and JSON lines must be so on every line",
        received,
        "Correct or remove the line.",
    )


def _text_of(record: Any, place: str) -> str | None:
    if isinstance(record, dict) and COLUMN in record and isinstance(record[COLUMN], str | None):
        return record[COLUMN]
    if isinstance(record, dict) and COLUMN in record:
        found = f"{COLUMN!r} is of type {type(record[COLUMN]).__name__}"
    else:
        found = _columns(record) if isinstance(record, dict) else f"a {type(record).__name__}"
    raise DataError(
        f"A row must be an object with a string {COLUMN!r}",
        f"{place}: {found}",
        f"Rename the field that has the text to {COLUMN}.",
    )


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, str]]:
    limit = csv.field_size_limit(_FIELD_LIMIT)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(filter(_is_filled, rows), None)
            if header is None:
                return
            at = _column(header, path)
            line = rows.line_num + 1
            for row in rows:
                if _is_filled(row) and len(row) != len(header):
                    rule = "A row of a CSV file must have as many fields as its header"
                    received = f"{path}:{line}: {len(row)} fields, header {_columns(header)}"
                    raise DataError(rule, received, 'Put text with a delimiter in it in quotes: "a, b".')
                if _is_filled(row):
                    yield f"{path}:{line}", row[at]
                line = rows.line_num + 1
    except csv.Error as error:
        rule = 'A CSV file must quote its fields as RFC 4180 does: "a ""word"", and more"'
        raise DataError(rule, f"{path}:{line}: {error}", "Correct or remove the row.") from error
    finally:
        csv.field_size_limit(limit)


def _is_filled(row: Sequence[str]) -> bool:
    return any(field.strip() for field in row)


def _read_parquet(path: Path) -> Iterator[tuple[str, str | None]]:
    try:
        arrow: Any = importlib.import_module("pyarrow")  # optional, and slow to import
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        rule = "Reading a parquet file takes pyarrow"
        raise DataError(rule, path, "pip install pyarrow, or convert the file to JSONL.") from error
    number = 0
    try:
        # Opened here: by their paths pyarrow would take some files for parts of a dataset.
        with path.open("rb") as file, parquet.ParquetFile(file) as rows:
            kind = rows.schema_arrow.types[_column(rows.schema_arrow.names, path)]
            _check_is_text(kind, arrow.types, path)
            for batch in rows.iter_batches(columns=[COLUMN]):
                for text in batch.column(0):
                    yield f"{path}[{number}]", text.as_py()
                    number += 1
    except UnicodeDecodeError as error:
        rule = "Text must be UTF-8"
        raise DataError(rule, f"{path}[{number}]: {error.reason}", "Correct the row.") from error
    except (arrow.ArrowException, OSError) as error:
        rule = "A parquet file must be whole"
        raise DataError(rule, f"{path}: {error}", "Copy or download it again.") from error


def _check_is_text(kind: Any, types: Any, path: Path) -> None:
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_kind(plain) for is_kind in (types.is_string, types.is_large_string, types.is_null)):
        rule = f"The column {COLUMN} of a parquet file must hold strings"
        raise DataError(rule, f"{path}: {kind}", "Convert the column, or rename the one that has the text.")


def _column(names: Sequence[str], path: Path) -> int:
    """The place of the text's column."""
    if names.count(COLUMN) != 1:
        raise DataError(
            f"A file of rows must have one column {COLUMN}",
            f"{path}: columns {_columns(names)}",
            f"Rename the column that has the text to {COLUMN}; a CSV file begins with its header.",
        )
    return names.index(COLUMN)


def _columns(names: Any) -> str:
    """The names of columns, as many and as much of each as a message has room for."""
    short = [name if len(name) <= 40 else f"{name[:40]}…" for name in map(well_formed, names)]
    return ", ".join(short[:12]) + (f", … ({len(short)})" if len(short) > 12 else "")


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, str | None]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
ROW_SUFFIXES = tuple(_READERS)
_COMPRESSED = {
    ".gz": "gunzip -k",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".tgz": "tar -xzf",
    ".tar": "tar -xf",
}
SUFFIXES = (".txt", *ROW_SUFFIXES, *_COMPRESSED)
