"""The rows of a dataset of the Hub, and of one that the datasets library holds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hylorada_jax.data.rows import READ_SUFFIXES, SUFFIXES, Row, arrow_row, as_row, read_rows
from hylorada_jax.errors import DataError
from hylorada_jax.io import hub

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.,+-]*)(?::(\w[^*?]*))?)?")
# As a word: "constraints" and "terrain" have it in them too.
_TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
# Files that datasets' own tools write beside the data.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")


class HubDataset(NamedTuple):
    """A dataset of the Hub by its name, its configuration and its split, of which both may be left to it."""

    name: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return ":".join([self.name, self.config or "", self.split or ""]).rstrip(":")


def hub_dataset(source: str) -> HubDataset | None:
    """What "owner/name", "owner/name:config" or "owner/name:config:split" names.

    Args:
        source: as given; the configuration may be empty.

    Returns:
        The dataset; None for another source, and where a file or a directory has its name.

    Example:
        >>> hub_dataset("owner/name::train[:1000]"), hub_dataset("texts/a.txt")
        (HubDataset(name='owner/name', config=None, split='train[:1000]'), None)
    """
    found = _NAME.fullmatch(source)
    if found is None or source.lower().endswith(SUFFIXES):
        return None
    name, config, split = found.groups()
    if os.path.exists(name):
        return None
    return HubDataset(name, config or None, split)


def hub_rows(dataset: HubDataset, columns: Collection[str]) -> Iterator[Row | DataError]:
    """The rows of a dataset of the Hub: by the datasets library, or without it, of the files in it.

    Args:
        dataset: its split is "train" where it names none. Without the library its configuration and its split
            must be left out; of files with the word "train" in their path then only those are read.
        columns: those that are read.

    Yields:
        As :func:`hylorada_jax.data.rows.read_rows`.

    Raises:
        DataError: it cannot be reached, has no such configuration or split, or takes the library.
    """
    plain = dataset.config is None and dataset.split in (None, "train")
    try:
        found = hub.dataset(dataset.name, dataset.config, dataset.split or "train")
    except ImportError as error:
        if not plain:
            rule = "A configuration or a split of a Hub dataset takes the datasets library."
            raise DataError(rule, dataset, 'Install it: `pip install "hylorada[hub]"`.') from error
    except Exception as error:  # many kinds: no network, no such dataset, no permission, damage
        if not (plain and hub.is_offline()):
            raise _unreachable(dataset, error) from error
    else:
        yield from dataset_rows(found, f"{dataset}[{{}}]", columns)
        return
    for path in _files(dataset):
        yield from read_rows(path, columns)


def dataset_rows(
    rows: Iterable[Mapping[str, Any]], place: str, columns: Collection[str]
) -> Iterator[Row | DataError]:
    """The rows of an iterable, such as a ``Dataset`` or an ``IterableDataset`` of the datasets library.

    Args:
        rows: dictionaries, or a dataset; of that only what is asked for is decoded.
        place: what an error calls a row, with {} for its number.
        columns: those that are read of a dataset.

    Yields:
        Rows; the error for what is none.
    """
    if isinstance(rows, Mapping):
        names = ", ".join(map(str, rows))
        raise DataError("Rows must be those of one split.", names, 'Take one, as in dataset["train"].')
    library = sys.modules.get("datasets")  # who has one of its datasets has imported it
    if library is None or not isinstance(rows, (library.Dataset, library.IterableDataset)):
        for number, values in enumerate(rows):
            yield as_row(values, place.format(number))
        return
    plain = rows.with_format(None)  # lists and dictionaries, and no arrays
    header = plain.column_names or ()
    wanted = [name for name in header if name in columns]
    for number, values in enumerate(plain.select_columns(wanted) if wanted else plain):
        yield Row(place.format(number), arrow_row(values, header or values))


def _files(dataset: HubDataset) -> list[Path]:
    patterns = [f"*{form}" for suffix in READ_SUFFIXES for form in (suffix, suffix.upper())]
    try:
        root = hub.fetch(dataset.name, patterns, "dataset")
    except Exception as error:  # the client raises many kinds
        raise _unreachable(dataset, error) from error
    files = sorted(
        path
        for path in root.rglob("*")
        if path.name.lower().endswith(READ_SUFFIXES) and path.name not in _NOT_DATA and path.is_file()
    )
    if not files:
        raise DataError(
            f"A Hub dataset must have {', '.join(READ_SUFFIXES)} files.",
            dataset,
            "Convert it, and give the files.",
        )
    return [path for path in files if _TRAINING.search(path.relative_to(root).as_posix())] or files


def _unreachable(dataset: HubDataset, error: Exception) -> DataError:
    if hub.is_offline():
        rule = "Offline, a Hub dataset must be in the local cache, with its configuration and split."
        remedy = f"Fetch it once: `hf download --repo-type dataset {dataset.name}`, or go online."
        return DataError(rule, f"{dataset}: {error}", remedy)
    rule = f"The Hub dataset {str(dataset)!r} must be reachable, or downloaded before."
    remedy = "Check the name, its configuration and split, and the network, or give files of your own."
    return DataError(rule, error, remedy)
