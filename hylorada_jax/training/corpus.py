"""Texts to train on: files, globs, JSONL, datasets of the Hub, and the source of Python's own library."""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hylorada_jax.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The name of the embedded corpus, which every machine that runs this package has."""

Split = Literal["train", "eval", "all"]

_HELD_OUT = Fraction(1, 20)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Tests, generated tables and programs that happen to be shipped along are not library source.
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip


class Document(NamedTuple):
    """One text and where it came from: a file, or ``file:line``."""

    name: str
    text: str


def load_documents(source: str | Path, split: Split = "all") -> list[Document]:
    """The documents of a source, or one side of its split into training and held-out documents.

    The side is decided by a hash of a document's content: about 5 % are held out, the choice does not depend
    on the machine or on the other documents, and two copies of one text are always on the same side. Where
    that would leave a side empty, the document of the smallest hash is held out; a single document gives
    its last lines, about 5 % of its text.

    Args:
        source: ``"python-stdlib"``; a file; a glob (``"books/**/*.txt"``); or a dataset of the Hub
            (``"owner/name"``). ``*.jsonl`` has one JSON object with a ``"text"`` per line, ``*.parquet`` a
            column ``text``; any other file is one document, UTF-8. Of a Hub dataset with files named
            "train" only those are read.
        split: ``"train"``, ``"eval"`` or ``"all"``.

    Returns:
        Documents that are not blank, ordered by name.

    Raises:
        DataError: nothing is found, a file cannot be read, or no document has any text.

    Example:
        >>> train, held_out = (load_documents("python-stdlib", split) for split in ("train", "eval"))
        >>> len(train) > 10 * len(held_out) > 0
        True
    """
    source = str(source)
    found = _standard_library() if source == PYTHON_STDLIB else _read_files(_files(source))
    documents = [document for document in found if document.text.strip()]
    if not documents:
        raise DataError("Data must have text in it", source, "Give files that are not empty.")
    if split == "all":
        return documents
    train, held_out = _divide(documents)
    return train if split == "train" else held_out


def _divide(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, neither empty."""
    hashes = [hashlib.sha256(document.text.encode()).digest() for document in documents]
    distinct = set(hashes)
    if len(distinct) == 1:
        return _cut_tail(documents[0])
    limit = int(_HELD_OUT * 2**64).to_bytes(8, "big")
    chosen = {digest for digest in distinct if digest[:8] < limit}
    if not chosen or chosen == distinct:
        chosen = {min(distinct)}
    train: list[Document] = []
    held_out: list[Document] = []
    for document, digest in zip(documents, hashes, strict=True):
        (held_out if digest in chosen else train).append(document)
    return train, held_out


def _cut_tail(document: Document) -> tuple[list[Document], list[Document]]:
    """One document's head and tail, cut at a line where there is one near."""
    at = int(len(document.text) * (1 - _HELD_OUT))
    at = document.text.rfind("\n", at // 2, at) + 1 or at
    head, tail = document.text[:at], document.text[at:]
    if not head.strip() or not tail.strip():
        rule = "Data must be long enough to hold a part of it out"
        raise DataError(rule, f"{document.name}: {len(document.text)} characters", "Give more text.")
    return [Document(document.name, head)], [Document(f"{document.name} (held-out end)", tail)]


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # _sysconfigdata describes the machine that built Python: no two would train on the same text.
        if _NOT_LIBRARY.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                yield Document(name.as_posix(), path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue


def _files(source: str) -> list[Path]:
    """The files that a source names, sorted."""
    if Path(source).is_file():
        return [Path(source)]
    if Path(source).is_dir():
        raise DataError("Data must be files, not a directory", source, f'Give a glob: "{source}/**/*.txt".')
    if glob.has_magic(source):
        if files := sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()):
            return files
        raise DataError(
            "A glob must match at least one file", source, 'Quote it, and use "**" for subdirectories.'
        )
    if _HUB_NAME.fullmatch(source) and not source.endswith(_FILE_SUFFIXES):
        return _hub_files(source)
    raise DataError(
        "Data must be a file, a glob, a Hub dataset (owner/name) or python-stdlib", source, "Check the path."
    )


def _hub_files(name: str) -> list[Path]:
    # Imported here: only this source needs it, and it takes half a second.
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in _FILE_SUFFIXES]
    try:
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds: no network, no such dataset, no permission
        rule = f"The Hub dataset {name!r} must be reachable, or downloaded before"
        raise DataError(rule, error, "Check the name and the network, or give files of your own.") from error
    files = sorted(path for path in root.rglob("*") if path.suffix in _FILE_SUFFIXES)
    if not files:
        raise DataError(
            f"A Hub dataset must have {', '.join(patterns)} files", name, "Convert it, and give the files."
        )
    return [path for path in files if "train" in path.relative_to(root).as_posix()] or files


def _read_files(files: Iterable[Path]) -> Iterator[Document]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        try:
            yield from readers.get(path.suffix, _read_text)(path)
        except UnicodeDecodeError as error:
            raise DataError("Text must be UTF-8", f"{path}: {error}", "Convert the file to UTF-8.") from error
        except OSError as error:
            raise DataError("A data file must be readable", f"{path}: {error}", "Check the file.") from error


def _read_text(path: Path) -> Iterator[Document]:
    yield Document(str(path), path.read_text(encoding="utf-8"))


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                rule = "Every line of a JSONL file must be JSON"
                raise DataError(rule, f"{path}:{number}: {error}", "Correct or remove the line.") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                rule = 'Every line of a JSONL file must be an object with a string "text"'
                raise DataError(rule, f"{path}:{number}: {keys}", "Rename the field that has the text.")
            yield Document(f"{path}:{number}", record["text"])


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")  # optional, and slow to import
    except ImportError as error:
        rule = "Reading a parquet file takes pyarrow"
        raise DataError(rule, path, "pip install pyarrow, or convert the file to JSONL.") from error
    columns = parquet.read_schema(path).names
    if "text" not in columns:
        rule = "A parquet file must have a column text"
        raise DataError(rule, f"{path}: {', '.join(columns)}", "Rename the column that has the text.")
    for number, text in enumerate(parquet.read_table(path, columns=["text"])["text"].to_pylist()):
        yield Document(f"{path}:{number}", text or "")
