"""Paths in a bucket: ``gs://bucket/run``, as etils' epath and gcsfs have them, and orbax takes them.

Such a path has the methods of pathlib's, and is typed as one. It differs in this: a file appears whole when
it is written; there are no renames, links and locks, and nothing can be appended; and a directory is what
names begin with, so that none is made, and none is left where nothing is in it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from hylorada_jax.errors import CheckpointError, ConfigError, HyLoRADAError, require_packages

_Kind: TypeAlias = Literal["file", "directory"]

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<rest>.*)", re.DOTALL)
# What orbax, etils and fsspec read in a name as it is, and not as a pattern.
_PLAIN = re.compile(r"gs://[\w.-]+(/[\w.=-]+)+", re.ASCII)


def url_of(path: str | Path) -> str | None:
    """The URL that a path is, if it is one; a Path made of it has lost a slash.

    Args:
        path: as a user typed it. A directory "gs:" that is there makes it a path of the file system.

    Example:
        >>> url_of(Path("gs://bucket/run")), url_of("runs/a")
        ('gs://bucket/run', None)
    """
    found = _URL.fullmatch(str(path))
    if found is None or os.path.lexists(f"{found['scheme']}:"):
        return None
    return f"{found['scheme']}://{found['rest']}"


def bucket_path(url: str) -> Path:
    """The path of a URL that begins with ``gs://``.

    Raises:
        ConfigError: gcsfs is not installed.
    """
    require_packages(
        "Paths in a bucket are read and written by gcsfs.", ["gcsfs"], 'Run `pip install "hylorada[gcs]"`.'
    )
    import fsspec
    from etils import epath

    # What goes wrong is raised too, and told once; gcsfs would log it with a traceback before.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # A listing that is kept would not show what another process, or tensorstore in this one, has written.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return cast("Path", epath.Path(url))


def is_in_bucket(path: Path) -> bool:
    """Whether a path is one of :func:`bucket_path`."""
    return not isinstance(path, Path)


@contextmanager
def answering(path: Path) -> Iterator[None]:
    """Makes an OSError with a text of what may go wrong on the way to a bucket; FileNotFoundError stays.

    Args:
        path: what is asked for. One of the file system raises OSErrors by itself.
    """
    try:
        yield
    except (FileNotFoundError, HyLoRADAError):
        raise
    except Exception as error:  # of gcsfs, aiohttp, the login; some have no text
        if not is_in_bucket(path) or getattr(error, "strerror", None):
            raise
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(errno.EIO, text, str(path)) from error


def kind(path: Path) -> _Kind | None:
    """What is at a path of a bucket; None for nothing. An OSError where that cannot be known."""
    try:
        with answering(path):
            store, name = _store(path)
            return _kind_in(store.info(name))
    except FileNotFoundError:
        return None


def children(directory: Path) -> dict[Path, _Kind]:
    """What is in a directory of a bucket, if there is any; an OSError where that cannot be known."""
    try:
        with answering(directory):
            store, name = _store(directory)
            found = store.ls(name, detail=True)
    except FileNotFoundError:
        return {}
    return {directory / each["name"].rstrip("/").rpartition("/")[2]: _kind_in(each) for each in found}


def _kind_in(described: Mapping[str, Any]) -> _Kind:
    return "directory" if described["type"] == "directory" else "file"


def size(path: Path) -> int:
    """The bytes of a file in a bucket; an OSError where there is none."""
    with answering(path):
        store, name = _store(path)
        return int(store.size(name))


def files(directory: Path) -> dict[Path, int]:
    """All files below a directory of a bucket, and their bytes; an OSError where that cannot be known."""
    with answering(directory):
        store, name = _store(directory)
        found = store.find(name, detail=True)
    return {directory / path.removeprefix(f"{name}/"): each["size"] for path, each in found.items()}


def write(path: Path, content: bytes) -> None:
    """Writes a file of a bucket: it has the old content or the new. An OSError where that fails."""
    with answering(path):
        store, name = _store(path)
        store.pipe_file(name, content)


def remove(path: Path) -> None:
    """Deletes a file; a directory is gone where nothing is left in it, and an OSError else."""
    try:
        with answering(path):
            store, name = _store(path)
            store.rm_file(name)
    except FileNotFoundError:
        if kind(path) == "directory":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path)) from None


def move(source: Path, target: Path) -> None:
    """Copies what is below a directory to another within the store, and then deletes it there."""
    with answering(source):
        store, name = _store(source)
        store.mv(name, str(target), recursive=True)


def refuse_unusable(directory: Path, name: str) -> None:
    """Raises a CheckpointError where no file can be written below a path of a bucket; leaves nothing there.

    Args:
        directory: exists or not.
        name: of a file that is in no one's way. It is written and deleted, for a bucket does not say what it
            would let us do.

    Raises:
        ConfigError: the path has characters that stand for others.
    """
    if not _PLAIN.fullmatch(str(directory)):
        raise ConfigError(
            "A path in a bucket must be names of letters, digits, '.', '_', '=' and '-'.",
            str(directory),
            "Write it as gs://bucket/runs/a.",
        )
    try:
        if kind(directory) == "file":
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        write(directory / name, b"")
        remove(directory / name)
    except OSError as error:
        raise CheckpointError(
            "The output must be a directory of a bucket that can be read and written.",
            f"{directory}: {error.strerror or error}",
            "Look at the bucket's name and your rights there (`gcloud storage ls`, "
            "`gcloud auth application-default login`), or choose another output directory.",
        ) from error


def refuse_undescribed(directory: Path) -> None:
    """Raises a CheckpointError where a bucket does not say of what kind it is.

    orbax asks that before it deletes a checkpoint, so a run would end when its first one is to go.
    """
    from google.cloud import storage  # which gcsfs needs

    try:
        with answering(directory):
            storage.Client().get_bucket(str(directory).split("/")[2])
    except OSError as error:
        raise CheckpointError(
            "A run's bucket must say of what kind it is, which is asked before an old checkpoint is deleted.",
            f"{directory}: {error.strerror or error}",
            "Ask for the right storage.buckets.get there (the role Storage Legacy Bucket Reader has it), and "
            "set GOOGLE_CLOUD_PROJECT.",
        ) from error


def _store(path: Path) -> tuple[Any, str]:
    """The file system of a path, and the path's name there."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))
