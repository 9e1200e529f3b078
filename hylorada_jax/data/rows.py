"""The rows in a file: of JSON lines, JSON, CSV or parquet, or one row that is a plain text."""

from __future__ import annotations

import codecs
import csv
import datetime
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from hylorada_jax.data.columns import names
from hylorada_jax.errors import DataError
from hylorada_jax.text import parse_json

# Characters of a line or a field, and bytes of a file that is read whole. csv's own limit is 131,072.
_LIMIT, _WHOLE = 2**26, 2**30
# What a small parquet or .gz file may expand to, and any file per byte: one string may fill a million rows.
_EXPANDED, _EXPANSION = 2**27, 100
# Bytes that Python takes for a list or a mapping at least.
_OBJECT = 64


class Row(NamedTuple):
    """One row and where it came from: a file, ``file:line``, or ``file[row]`` where rows are not lines."""

    place: str
    values: Mapping[str, Any]


def read_rows(path: Path, columns: Collection[str] = ("text",)) -> Iterator[Row | DataError]:
    """The rows in a file, by its suffix in either case.

    ``.jsonl`` and ``.ndjson`` have a JSON object per line; ``.json`` an array of objects, one object, or an
    object per line; ``.csv`` and ``.tsv`` a header and rows (RFC 4180); ``.parquet`` rows. Any other file is
    one row, its column ``text`` the whole of it. Behind each may stand ``.gz``. Text is UTF-8; a byte order
    mark is dropped.

    Args:
        path: a file.
        columns: those that are read of a parquet file, which is null in all where it has none of them; of
            others all are.

    Yields:
        Rows in the file's order. For one that is malformed, an error that says in which line: a line is not
        JSON, a row is not an object, a CSV row has other fields than its header, wrong quotes or a field of
        more than 2²⁶ characters, or Python has no value for what is in a row of parquet.

    Raises:
        DataError: the file is not a regular one, damaged or not UTF-8, has a line of more than 2²⁶
            characters, has more than 2³⁰ bytes and is read whole, or expands a hundredfold.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    suffix = suffixes[-1 - packed] if len(suffixes) > packed else ""
    if suffix in _COMPRESSED or (packed and suffix == ".parquet"):
        remedy = f"Unpack it: `{_COMPRESSED['.gz' if packed else suffix]} {path}`."
        raise DataError("A data file may be compressed by gzip alone.", path, remedy)
    try:
        if not path.is_file():  # a pipe may never end, nor a device
            raise DataError("A data file must be a regular file.", path, "Write the data into a file.")
        yield from _READERS.get(suffix, _read_text)(path, columns)
    except UnicodeDecodeError as error:
        received = f"{_undecodable(path)}: {error.reason}"
        raise DataError("Text must be UTF-8.", received, "Convert the file to UTF-8, with iconv.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("A data file must be readable.", f"{path}: {error}", "Check the file.") from error


class _Unpacked(gzip.GzipFile):
    """A .gz file that does not fill the disk of whoever reads it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._place, self._limit = path, max(_EXPANDED, _EXPANSION * path.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        left = self._limit + 1 - self.tell()  # whoever asks for more gets no more unpacked
        part = super().read(left if size is None or size < 0 else min(size, left))
        if self.tell() > self._limit:
            raise _expands("A .gz file", str(self._place), self.tell(), self._limit)
        return part

    read1 = read


def _open(path: Path) -> BinaryIO:
    return _Unpacked(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline)


def _undecodable(path: Path) -> str:
    """Where a file is not UTF-8."""
    number, decoder = 1, codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
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
    with _open_text(path) as file:
        text = file.read(_WHOLE + 1)
    if len(text) > _WHOLE:
        raise _too_long("A file that is not a table of rows", _WHOLE, "characters", f"{path}: more")
    return text


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


def _read_text(path: Path, columns: Collection[str]) -> Iterator[Row | DataError]:
    yield Row(str(path), {"text": _whole(path)})


def _read_jsonl(path: Path, columns: Collection[str]) -> Iterator[Row | DataError]:
    with _open_text(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                yield as_row(parse_json(line.rstrip("\r\n")), f"{path}:{number}")
            except json.JSONDecodeError as error:  # which counts lines from this one
                yield _not_json(f"{path}:{number}: {error.msg} in column {error.colno}")
            except ValueError as error:
                yield _not_json(f"{path}:{number}: {error}")


def _read_json(path: Path, columns: Collection[str]) -> Iterator[Row | DataError]:
    text = _whole(path)
    if not text.strip():
        return
    try:
        value = parse_json(text)
    except ValueError as error:
        if getattr(error, "msg", "") != "Extra data":  # behind a whole first value: it is JSON lines
            raise _not_json(f"{path}: {error}") from error
        yield from _read_jsonl(path, columns)
        return
    for number, record in enumerate(value if isinstance(value, list) else [value]):
        yield as_row(record, f"{path}[{number}]")


def _not_json(received: str) -> DataError:
    return DataError(
        "JSON must be well formed, and JSON lines must be so on every line.",
        received,
        "Correct or remove the line.",
    )


def as_row(record: Any, place: str) -> Row | DataError:
    """A row of its values by column; the error for anything else."""
    if isinstance(record, Mapping):
        return Row(place, record)
    return DataError(
        "A row must be an object.", f"{place}: a {type(record).__name__}", 'Write it as {"text": …}.'
    )


def _read_csv(path: Path, columns: Collection[str], delimiter: str) -> Iterator[Row | DataError]:
    limit = csv.field_size_limit(_LIMIT)
    try:
        with _open_text(path, newline="") as file:
            rows = csv.reader(_lines(file, path), delimiter=delimiter, strict=True)
            header = next(filter(_is_filled, rows), None)
            if header is None:
                return
            _check_header(header, path)
            while True:
                line = rows.line_num + 1
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:  # the reader goes on behind it
                    yield _misquoted(path, line, error)
                    continue
                if _is_filled(row) and len(row) != len(header):
                    rule = "A row of a CSV file must have as many fields as its header."
                    received = f"{path}:{line}: {len(row)} fields, header {names(header)}"
                    yield DataError(rule, received, 'Put text with a delimiter in it in quotes: "a, b".')
                elif _is_filled(row):
                    yield Row(f"{path}:{line}", dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise _misquoted(path, 1, error) from error
    finally:
        csv.field_size_limit(limit)


def _misquoted(path: Path, line: int, error: csv.Error) -> DataError:
    rule = 'A CSV file must quote its fields as RFC 4180 does: "a ""word"", and more".'
    return DataError(rule, f"{path}:{line}: {error}", "Correct or remove the row.")


def _is_filled(row: Sequence[str]) -> bool:
    return any(field.strip() for field in row)


def _read_parquet(path: Path, columns: Collection[str]) -> Iterator[Row | DataError]:
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
            header = rows.schema_arrow.names
            _check_header(header, path)
            chosen = [name for name in header if name in columns]
            for batch in _batches(rows, chosen or header, path, limit):
                for at in range(len(batch)):
                    place = f"{path}[{number}]"
                    # Columns that nobody asked for are named alone: what is in them may have no value.
                    one = batch.slice(at, 1)  # alone, so that an error is of this row
                    row = _arrow_values(one, place, header) if chosen else Row(place, dict.fromkeys(header))
                    expanded += _size(row.values) if isinstance(row, Row) else _OBJECT
                    if expanded > limit:
                        raise _expands("A parquet file", place, expanded, limit)
                    yield row
                    number += 1
    except UnicodeDecodeError as error:
        rule = "Text must be UTF-8."
        raise DataError(rule, f"{path}[{number}]: {error.reason}", "Correct the row.") from error
    except (arrow.ArrowException, OSError) as error:
        rule = "A parquet file must be whole."
        raise DataError(rule, f"{path}: {error}", "Copy or download it again.") from error


def _arrow_values(row: Any, place: str, header: Sequence[str]) -> Row | DataError:
    """A row of a batch that has one; the error where Python has no value for what is in it."""
    try:
        (values,) = row.to_pylist(maps_as_pydicts="strict")
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, KeyError) as error:
        rule = "In a parquet file times are of the years 1 to 9999, and names of a struct or map differ."
        return DataError(rule, f"{place}: {error}", "Correct or remove the row, or write times as text.")
    return Row(place, arrow_row(values, header))


def _batches(rows: Any, columns: Sequence[str], path: Path, limit: int) -> Iterator[Any]:
    """The rows of a parquet file, so many at a time that they fit in memory if each is as long as can be."""
    for group in range(rows.num_row_groups):
        every = map(rows.metadata.row_group(group).column, range(len(rows.schema)))
        leaves = [leaf for leaf in every if leaf.path_in_schema.split(".")[0] in columns]
        size = sum(leaf.total_uncompressed_size for leaf in leaves)
        # Of nothing, such as empty lists, the file may have any number in some bytes.
        if (most := max(size, _OBJECT * sum(leaf.num_values for leaf in leaves))) > limit:
            raise _expands("A parquet file", f"{path}, row group {group}", most, limit)
        batch = max(1, min(1024, _EXPANDED // max(1, size)))
        yield from rows.iter_batches(batch, row_groups=[group], columns=[*columns])


def arrow_row(values: Mapping[str, Any], header: Iterable[str]) -> dict[str, Any]:
    """A row of arrow's with all columns of a header, also where they are null or were not read.

    Within a column are no nulls: arrow gives every struct in it the fields of all. Dates and times, which
    JSON has none of, are text.
    """
    return {name: _as_json(values.get(name)) for name in header}


def _as_json(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _as_json(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [*map(_as_json, value)]
        case datetime.date() | datetime.time():
            return value.isoformat()
    return value


def _size(value: Any) -> int:
    """About what Python takes for a row's values."""
    if isinstance(value, Mapping | list):
        return _OBJECT + sum(map(_size, value.values() if isinstance(value, Mapping) else value))
    return len(value) if isinstance(value, str) else 8


def _expands(what: str, place: str, size: int, limit: int) -> DataError:
    rule = f"{what} must not expand to more than {_EXPANSION} times its size."
    return DataError(rule, f"{place}: {size:,} bytes, more than {limit:,}", "Convert it to .jsonl, in parts.")


def _check_header(header: Sequence[str], path: Path) -> None:
    if len(set(header)) != len(header):
        raise DataError(
            "The columns of a table must have different names.",
            f"{path}: columns {names(header)}",
            "Rename all but one; a CSV file begins with its header.",
        )


_READERS: dict[str, Callable[[Path, Collection[str]], Iterator[Row | DataError]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
_PLAIN = (".txt", *_READERS)
READ_SUFFIXES = (*_PLAIN, *(f"{suffix}.gz" for suffix in _PLAIN if suffix != ".parquet"))
"""How the files end that :func:`read_rows` reads."""
_COMPRESSED = {
    ".gz": "gunzip -k",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".tgz": "tar -xzf",
    ".tar": "tar -xf",
}
SUFFIXES = (*_PLAIN, *_COMPRESSED)
