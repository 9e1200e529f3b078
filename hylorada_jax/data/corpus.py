"""Data to train on: files, globs, datasets of the Hub, rows of one's own, and Python's own library."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, overload

from hylorada_jax.data.columns import COLUMNS, Format, OtherNames, names
from hylorada_jax.data.docstrings import docstring_rows
from hylorada_jax.data.examples import Completion, Conversation, Document, Example
from hylorada_jax.data.formats import read_row, recognise
from hylorada_jax.data.hub_rows import dataset_rows, hub_dataset, hub_rows
from hylorada_jax.data.rows import Row, read_rows
from hylorada_jax.errors import DataError, require_one_of
from hylorada_jax.terminal import one_line

PYTHON_STDLIB = "python-stdlib"
"""The embedded texts, which every machine that runs this package has: the source of Python's library."""
PYTHON_DOCSTRINGS = "python-docstrings"
"""The embedded conversations, made of it: :func:`hylorada_jax.data.docstrings.docstring_rows`."""
EMBEDDED = (PYTHON_STDLIB, PYTHON_DOCSTRINGS)

Split = Literal["train", "eval", "all"]

_HELD_OUT = Fraction(1, 20)
# Tests, generated tables and programs that happen to be shipped along are not library source.
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip


Rows = Iterable[Mapping[str, Any]]


@overload
def load_documents(
    source: str | Path | Rows,
    split: Split = ...,
    *,
    form: Literal["text"],
    columns: Mapping[str, str] | None = ...,
    skipped: list[DataError] | None = ...,
) -> list[Document]: ...
@overload
def load_documents(
    source: str | Path | Rows,
    split: Split = ...,
    *,
    form: Format | None = ...,
    columns: Mapping[str, str] | None = ...,
    skipped: list[DataError] | None = ...,
) -> list[Example]: ...
def load_documents(
    source: str | Path | Rows,
    split: Split = "all",
    *,
    form: Format | None = None,
    columns: Mapping[str, str] | None = None,
    skipped: list[DataError] | None = None,
) -> Any:
    """The documents of a source, or one side of its split into training and held-out documents.

    The side is decided by a hash of a document's content: about 5 % are held out, the choice does not depend
    on the machine or on the other documents, and copies of one text, or of one conversation of which other
    answers count, are always on the same side. Where that would leave a side empty, the document of the
    smallest hash is held out; a single text gives its last lines, about 5 % of it. Of ``"python-docstrings"``
    whole modules are held out.

    Args:
        source: ``"python-stdlib"`` or ``"python-docstrings"``; a file; a glob (``"books/**/*.txt"``); a
            dataset of the Hub (``"owner/name"``, ``"owner/name:config"``, ``"owner/name:config:split"``, its
            split "train" where none is named); or any iterable of dictionaries, such as a
            ``datasets.Dataset``. Rows of ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` and
            ``.parquet`` files are documents of the format that their columns tell
            (:func:`hylorada_jax.data.formats.recognise`); any other file is one text
            (:func:`hylorada_jax.data.rows.read_rows`).
        split: ``"train"``, ``"eval"`` or ``"all"``.
        form: the format; None recognises it by the columns of the first row.
        columns: other names of the format's columns and of messages' keys, as {"text": "body"}; each applies
            where it occurs; one that occurs nowhere gives a warning.
        skipped: gets the errors of malformed rows, which are left out; None raises the first.

    Returns:
        Documents ordered by name; texts that are null or blank are left out.

    Raises:
        DataError: nothing is found, a file cannot be read, a row is not of the format, or no document has
            any text. File and line are named.
        ConfigError: the split or the format is unknown.

    Example:
        >>> train, held_out = (load_documents("python-stdlib", split) for split in ("train", "eval"))
        >>> len(train) > 10 * len(held_out) > 0
        True
    """
    require_one_of("split", split, get_args(Split))
    if form is not None:
        require_one_of("form", form, get_args(Format))
    others = OtherNames(columns or {})
    documents = list(_examples(_rows(source, others.theirs), form, others, skipped))
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    if not documents:
        raise DataError("Data must have text in it.", name, "Give files that are not empty.")
    if absent := [other for ours, other in others.theirs.items() if ours not in others.met]:
        warnings.warn(f"no row of {one_line(name)} has {names(absent)}", stacklevel=2)
    if split == "all":
        return documents
    ((train, held_out),) = divide([(documents, source)])
    return train if split == "train" else held_out


def _rows(source: str | Path | Rows, columns: Mapping[str, str]) -> Iterator[Row | DataError]:
    wanted = {*COLUMNS, *columns.values()}
    if not isinstance(source, str | Path):
        yield from dataset_rows(source, "row {}", wanted)
    elif str(source) == PYTHON_STDLIB:
        yield from _standard_library()
    elif str(source) == PYTHON_DOCSTRINGS:
        yield from docstring_rows(_standard_library())
    elif dataset := hub_dataset(str(source)):
        yield from hub_rows(dataset, wanted)
    else:
        for path in _files(str(source)):
            yield from read_rows(path, wanted)


def _examples(
    rows: Iterable[Row | DataError],
    form: Format | None,
    others: OtherNames,
    skipped: list[DataError] | None,
) -> Iterator[Example]:
    for row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            form = form or recognise(others.columns(row.values), row.place)
            example = read_row(row.values, row.place, form, others)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(error)
        else:
            if example is not None:
                yield example


def divide(
    sources: Sequence[tuple[list[Example], str | Path | Rows]],
) -> list[tuple[list[Example], list[Example]]]:
    """Training and held-out documents, neither empty: both sides of what :func:`load_documents` splits.

    What is held out of one source is trained on in none, and a text whose end is held out in no other.

    Args:
        sources: all documents of each, and where they are from.

    Returns:
        Both sides of each source.

    Raises:
        DataError: there are too few, or too little text; or all of a source is held out of others.
    """
    sides = [_divide(documents, source) for documents, source in sources]
    if len(sides) == 1:
        return sides
    contents = [{_content(document) for document in documents} for documents, _ in sources]
    cut = set().union(*(texts for texts in contents if len(texts) == 1))  # into a head and a tail
    held = {_content(document) for _, held_out in sides for document in held_out}
    unseen = held | cut
    kept = [
        # A head is not what is held out, but the whole text may be, elsewhere.
        [document for document in train if _content(document) not in unseen and not texts <= held]
        for texts, (train, _) in zip(contents, sides, strict=True)
    ]
    for train, (_, source) in zip(kept, sources, strict=True):
        if not train:
            rule = "A source must have a row that is not held out of another one."
            raise DataError(rule, source, "Leave it out, or give held-out rows by --eval-data.")
    return [(train, held_out) for train, (_, held_out) in zip(kept, sides, strict=True)]


def trained_on(held_out: Iterable[Example], train: Iterable[Example]) -> int:
    """How many held-out documents say what one that is trained on says."""
    contents = {_content(document) for document in train}
    return sum(_content(document) in contents for document in held_out)


def _divide(documents: list[Example], source: str | Path | Rows) -> tuple[list[Example], list[Example]]:
    embedded = isinstance(source, str | Path) and str(source) == PYTHON_DOCSTRINGS
    by = _module if embedded else _content  # rows of one's own are not turned into text to be asked
    hashes = [hashlib.sha256(by(document).encode()).digest() for document in documents]
    distinct = set(hashes)
    if len(distinct) == 1:
        return _cut_tail(documents[0], len(documents))
    limit = int(_HELD_OUT * 2**64).to_bytes(8, "big")
    chosen = {digest for digest in distinct if digest[:8] < limit}
    if not chosen or chosen == distinct:
        chosen = {min(distinct)}
    train: list[Example] = []
    held_out: list[Example] = []
    for document, digest in zip(documents, hashes, strict=True):
        (held_out if digest in chosen else train).append(document)
    return train, held_out


def _content(document: Example) -> str:
    """What a document says, whatever it is called and whichever of its answers count."""
    match document:
        case Document(_, text):
            return text
        case Completion(_, prompt, completion):
            return json.dumps([prompt, completion])
        case Conversation(_, messages, _, tools):
            return json.dumps([messages, tools], sort_keys=True, default=str)


def _module(document: Example) -> str:
    return document.name.partition(":")[0]


def _cut_tail(document: Example, count: int) -> tuple[list[Example], list[Example]]:
    """The head and the tail of a text that is there so often, cut at a line where there is one near."""
    if not isinstance(document, Document):
        rule = "Data must have two different rows at least, to hold one of them out."
        received = f"{document.name} and {count - 1:,} like it" if count > 1 else f"{document.name} alone"
        raise DataError(rule, received, "Give more rows, or held-out ones by --eval-data.")
    size = len(document.text)
    at = int(size * (1 - _HELD_OUT))
    at = document.text.rfind("\n", int(size * (1 - 2 * _HELD_OUT)), at) + 1 or at
    head, tail = document.text[:at], document.text[at:]
    if not head.strip() or not tail.strip():
        rule = "Data must be long enough to hold a part of it out."
        raise DataError(rule, f"{document.name}: {len(document.text)} characters", "Give more text.")
    return [Document(document.name, head)], [Document(f"{document.name} (held-out end)", tail)]


def _standard_library() -> Iterator[Row]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # _sysconfigdata describes the machine that built Python: no two would train on the same text.
        if _NOT_LIBRARY.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                yield Row(name.as_posix(), {"text": path.read_text(encoding="utf-8-sig")})
            except UnicodeDecodeError:
                continue


def files_of(source: str) -> list[Path]:
    """The user's own files that a source of :func:`load_documents` names, sorted; none of any other source.

    Args:
        source: by its name.

    Raises:
        DataError: nothing is found.

    Example:
        >>> files_of("python-stdlib"), files_of("owner/name:config")
        ([], [])
    """
    return [] if source in EMBEDDED or hub_dataset(source) else _files(source)


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
    raise DataError(
        "Data must be a file, a glob, a Hub dataset (owner/name), python-stdlib or python-docstrings.",
        source,
        "Check the path.",
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
