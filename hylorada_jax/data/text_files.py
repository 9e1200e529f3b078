"""The documents in a file: plain text, or the rows of JSON lines, JSON, CSV or parquet."""

from __future__ import annotations

import codecs
import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from hylorada_jax.errors import DataError
from hylorada_jax.text import cut, parse_json, well_formed

COLUMN = "text"
"""The column, or the key of an object, that has a row's text."""

# Characters of a line or a field, and bytes of a file that is read whole. csv's own limit is 131,072.
_LIMIT, _WHOLE = 2**26, 2**30
# What a small parquet file may expand to, and any file per byte: one string may fill a million rows.
_EXPANDED, _EXPANSION = 2**27, 100


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
        DataError: the file is not a regular one, compressed, damaged or not UTF-8, or a row has no text; it
            says in which line. A line or a field of more than 2²⁶ characters, a file of more than 2³⁰ bytes
            that is read whole, or a parquet file that expands a hundredfold.
    """
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise DataError(
            "A data file must not be compressed.", path, f"Unpack it: `{_COMPRESSED[suffix]} {path}`."
        )
    try:
        if not path.is_file():  # a pipe may never end, nor a device
            raise DataError("A data file must be a regular file.", path, "Write the data into a file.")
        for name, text in _READERS.get(suffix, _read_text)(path):
            if text and text.strip():
                yield Document(name, well_formed(text))
    except UnicodeDecodeError as error:
        received = f"{_undecodable(path)}: {error.reason}"
        raise DataError("Text must be UTF-8.", received, "Convert the file to UTF-8, with iconv.") from error
    except OSError as error:
        raise DataError("A data file must be readable.", f"{path}: {error}", "Check the file.") from error


def _undecodable(path: Path) -> str:
    """Where a file is not UTF-8."""
    number, decoder = 1, codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while part := file.read(1 << 20):
                decoder.decode(part)
                number += part.count(b"\n")
        except UnicodeDecodeError as error:
            number += error.object.count(b"\n", 0, error.start)
    return f"{path}:{number}"


def _whole(path: Path) -> str:
    """The text of a file that is one piece."""
    if (size := path.stat().st_size) > _WHOLE:
        raise _too_long("A file that is not a table of rows", _WHOLE, "bytes", f"{path}: {size:,}")
    return path.read_text(encoding="utf-8-sig")


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file, none of which can exhaust the memory."""
    number = 1
    while line := file.readline(_LIMIT + 1):
        if len(line) > _LIMIT:
            raise _too_long("A line", _LIMIT, "characters", f"{path}:{number}: more")
        yield line
        number += 1


def _too_long(what: str, limit: int, unit: str, received: str) -> DataError:
    rule = f"{what} must have at most {limit:,} {unit}."
    return DataError(rule, received, "Divide it into documents, as the lines of a .jsonl file.")


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    yield str(path), _whole(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, str | None]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                yield f"{path}:{number}", _text_of(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[tuple[str, str | None]]:
    text = _whole(path)
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
        "JSON must be well formed, and JSON lines must be so on every line.",
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
        f"A row must be an object with a string {COLUMN!r}.",
        f"{place}: {found}",
        f"Rename the field that has the text to {COLUMN}.",
    )


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, str]]:
    limit = csv.field_size_limit(_LIMIT)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
            header = next(filter(_is_filled, rows), None)
            if header is None:
                return
            at = _column(header, path)
            line = rows.line_num + 1
            for row in rows:
                if _is_filled(row) and len(row) != len(header):
                    rule = "A row of a CSV file must have as many fields as its header."
                    received = f"{path}:{line}: {len(row)} fields, header {_columns(header)}"
                    raise DataError(rule, received, 'Put text with a delimiter in it in quotes: "a, b".')
                if _is_filled(row):
                    yield f"{path}:{line}", row[at]
                line = rows.line_num + 1
    except csv.Error as error:
        rule = 'A CSV file must quote its fields as RFC 4180 does: "a ""word"", and more".'
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
        rule = "Reading a parquet file takes pyarrow."
        raise DataError(
            rule, path, "Install it, `pip install pyarrow`, or convert the file to JSONL."
        ) from error
    number = expanded = 0
    limit = max(_EXPANDED, _EXPANSION * path.stat().st_size)
    try:
        # Opened here: by their paths pyarrow would take some files for parts of a dataset.
        with path.open("rb") as file, parquet.ParquetFile(file) as rows:
            kind = rows.schema_arrow.types[_column(rows.schema_arrow.names, path)]
            _check_is_text(kind, arrow.types, path)
            for batch in _batches(rows, path, limit):
                for value in batch.column(0):
                    text = value.as_py()
                    expanded += 64 + len(text or "")  # what Python's string takes
                    if expanded > limit:
                        raise _expands(f"{path}[{number}]", expanded, limit)
                    yield f"{path}[{number}]", text
                    number += 1
    except UnicodeDecodeError as error:
        rule = "Text must be UTF-8."
        raise DataError(rule, f"{path}[{number}]: {error.reason}", "Correct the row.") from error
    except (arrow.ArrowException, OSError) as error:
        rule = "A parquet file must be whole."
        raise DataError(rule, f"{path}: {error}", "Copy or download it again.") from error


def _batches(rows: Any, path: Path, limit: int) -> Iterator[Any]:
    """The texts of a parquet file, so many at a time that they fit in memory if each is as long as can be."""
    leaves = [rows.schema.column(n).path for n in range(len(rows.schema))]
    for group in range(rows.num_row_groups):
        size = rows.metadata.row_group(group).column(leaves.index(COLUMN)).total_uncompressed_size
        if size > limit:
            raise _expands(f"{path}, row group {group}", size, limit)
        batch = max(1, min(1024, _EXPANDED // max(1, size)))
        yield from rows.iter_batches(batch, row_groups=[group], columns=[COLUMN])


def _expands(place: str, size: int, limit: int) -> DataError:
    rule = f"A parquet file must not expand to more than {_EXPANSION} times its size."
    return DataError(rule, f"{place}: {size:,} bytes, more than {limit:,}", "Convert it to .jsonl, in parts.")


def _check_is_text(kind: Any, types: Any, path: Path) -> None:
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_kind(plain) for is_kind in (types.is_string, types.is_large_string, types.is_null)):
        rule = f"The column {COLUMN} of a parquet file must hold strings."
        raise DataError(rule, f"{path}: {kind}", "Convert the column, or rename the one that has the text.")


def _column(names: Sequence[str], path: Path) -> int:
    """The place of the text's column."""
    if names.count(COLUMN) != 1:
        raise DataError(
            f"A file of rows must have one column {COLUMN}.",
            f"{path}: columns {_columns(names)}",
            f"Rename the column that has the text to {COLUMN}; a CSV file begins with its header.",
        )
    return names.index(COLUMN)


def _columns(names: Any) -> str:
    """The names of columns, as many and as much of each as a message has room for."""
    short = [cut(well_formed(name), 40) for name in names]
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
