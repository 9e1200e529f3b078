"""Texts to train on: files, globs, datasets of the Hub, and the source of Python's own library."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

from hylorada_jax.data.text_files import ROW_SUFFIXES, SUFFIXES, Document, read_documents
from hylorada_jax.errors import DataError
from hylorada_jax.io import hub

PYTHON_STDLIB = "python-stdlib"
"""The name of the embedded corpus, which every machine that runs this package has."""

Split = Literal["train", "eval", "all"]

_HELD_OUT = Fraction(1, 20)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Files that datasets' own tools write beside the data.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")
# Tests, generated tables and programs that happen to be shipped along are not library source.
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip


def load_documents(source: str | Path, split: Split = "all") -> list[Document]:
    """The documents of a source, or one side of its split into training and held-out documents.

    The side is decided by a hash of a document's content: about 5 % are held out, the choice does not depend
    on the machine or on the other documents, and two copies of one text are always on the same side. Where
    that would leave a side empty, the document of the smallest hash is held out; a single document gives
    its last lines, about 5 % of its text.

    Args:
        source: ``"python-stdlib"``; a file; a glob (``"books/**/*.txt"``); or a dataset of the Hub
            (``"owner/name"``). The rows of ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` and
            ``.parquet`` files are documents, their column ``text`` the text; any other file is one document,
            UTF-8 (:func:`hylorada_jax.data.text_files.read_documents`). Of a Hub dataset with files
            named "train" only those are read.
        split: ``"train"``, ``"eval"`` or ``"all"``.

    Returns:
        Documents that are not blank, ordered by name.

    Raises:
        DataError: nothing is found, a file cannot be read, a row has no column ``text``, or no document has
            any text. File and line are named.

    Example:
        >>> train, held_out = (load_documents("python-stdlib", split) for split in ("train", "eval"))
        >>> len(train) > 10 * len(held_out) > 0
        True
    """
    source = str(source)
    if source == PYTHON_STDLIB:
        documents = [document for document in _standard_library() if document.text.strip()]
    else:
        documents = [document for path in _files(source) for document in read_documents(path)]
    if not documents:
        raise DataError("Data must have text in it.", source, "Give files that are not empty.")
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
        rule = "Data must be long enough to hold a part of it out."
        raise DataError(rule, f"{document.name}: {len(document.text)} characters", "Give more text.")
    return [Document(document.name, head)], [Document(f"{document.name} (held-out end)", tail)]


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # _sysconfigdata describes the machine that built Python: no two would train on the same text.
        if _NOT_LIBRARY.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                yield Document(name.as_posix(), path.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError:
                continue


def _files(source: str) -> list[Path]:
    """The files that a source names, sorted."""
    source = os.path.expanduser(source)  # a quoted glob comes with its "~"; Path's method may raise
    try:
        is_file, is_dir = Path(source).is_file(), Path(source).is_dir()
    except (OSError, ValueError) as error:  # a name too long or with a null, a directory that is closed
        raise DataError("Data must be readable.", error, "Check the path.") from error
    if is_file:
        return [Path(source)]
    if is_dir:
        raise DataError("Data must be files, not a directory.", source, f'Give a glob: "{source}/**/*.txt".')
    if glob.has_magic(source):
        root, pattern = _split_glob(Path(source))
        if files := sorted({path for path in _matches(root, pattern) if path.is_file()}):
            return files
        raise DataError(
            "A glob must match at least one file.", source, 'Quote it, and use "**" for subdirectories.'
        )
    if _HUB_NAME.fullmatch(source) and not source.lower().endswith(SUFFIXES):
        return _hub_files(source)
    raise DataError(
        "Data must be a file, a glob, a Hub dataset (owner/name) or python-stdlib.", source, "Check the path."
    )


def _split_glob(source: Path) -> tuple[Path, Path]:
    """The directories that a glob begins with, as far as they exist by that very name, and the rest."""
    parts = source.parts
    known = next(n for n in range(len(parts) - 1, -1, -1) if os.path.isdir(Path(*parts[:n])))
    return Path(*parts[:known]), Path(*parts[known:])


def _matches(root: Path, pattern: Path) -> Iterator[Path]:
    """What a glob matches, "**" with every directory once: links that lead up would multiply without end."""
    parts = pattern.parts
    if "**" not in parts:
        yield from (root / name for name in glob.glob(str(pattern), root_dir=root))
        return
    at = parts.index("**")
    rest = Path(*parts[at + 1 :]) if parts[at + 1 :] else Path("*")
    for start in glob.glob(str(Path(*parts[:at])), root_dir=root) if at else ("",):
        seen = set()
        for name, directories, _ in os.walk(root / start, followlinks=True):
            directories[:] = sorted(inner for inner in directories if not inner.startswith("."))
            if (real := os.path.realpath(name)) in seen:
                directories.clear()
                continue
            seen.add(real)
            yield from _matches(Path(name), rest)


def _hub_files(name: str) -> list[Path]:
    suffixes = (".txt", *ROW_SUFFIXES)
    patterns = [f"*{form}" for suffix in suffixes for form in (suffix, suffix.upper())]
    try:
        root = hub.fetch(name, patterns, "dataset")
    except Exception as error:  # the client raises many kinds: no network, no such dataset, no permission
        if hub.is_offline():
            remedy = f"Fetch it once: `hf download --repo-type dataset {name}`, or go online."
            raise DataError("Offline, a Hub dataset must be in the local cache.", name, remedy) from error
        rule = f"The Hub dataset {name!r} must be reachable, or downloaded before."
        raise DataError(rule, error, "Check the name and the network, or give files of your own.") from error
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in suffixes and path.name not in _NOT_DATA and path.is_file()
    )
    if not files:
        raise DataError(
            f"A Hub dataset must have {', '.join(suffixes)} files.", name, "Convert it, and give the files."
        )
    return [path for path in files if "train" in path.relative_to(root).as_posix()] or files
