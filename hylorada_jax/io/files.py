"""Paths as users type them, what is at them, and writing a file whole."""

import contextlib
import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io import bucket

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["file", "directory", "link", "special file"]

TEMPORARY = r"\.hylorada-[0-9a-f]{16}"
"""The names of files that are being written, as a pattern: a kill leaves one behind."""

# The longest path that is written within an output directory is shorter.
_ROOM = "x" * 200


def user_path(path: str | Path) -> Path:
    """A path with the home directory for a leading ``~`` or ``~name``; nothing else in it has a meaning.

    Args:
        path: as the user typed it; a shell leaves ``--output=~/runs`` as it is.

    Example:
        >>> user_path("lr=[1e-4,2e-4]/*") == Path("lr=[1e-4,2e-4]/*")
        True
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a file's own name
        return Path(path)


def any_path(path: str | Path) -> Path:
    """As :func:`user_path`, or a path in a bucket (:mod:`hylorada_jax.io.bucket`): of runs and adapters.

    Args:
        path: as the user typed it.

    Raises:
        ConfigError: it begins with ``gs://``, and gcsfs is not installed.
    """
    if (url := bucket.url_of(path)) and url.startswith("gs://"):
        return bucket.bucket_path(url)
    return user_path(path)


def kind_of(path: Path) -> Kind | None:
    """What is at a path: a link is a link, wherever it leads, if anywhere.

    Args:
        path: any.

    Returns:
        "special file" for whatever is none of the others, as a pipe; None for nothing.

    Raises:
        OSError: it cannot be known, as for a name that is too long or in a directory that is closed.

    Example:
        >>> kind_of(Path("."))
        'directory'
    """
    if bucket.is_in_bucket(path):
        return bucket.kind(path)
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error)) from error
    kinds: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def refuse_unusable(directory: Path, *, in_bucket: bool = False) -> None:
    """Raises a CheckpointError where an output directory cannot be made or written into; changes nothing.

    Args:
        directory: exists or not; a link to a directory is one.
        in_bucket: it may be in a bucket.

    Raises:
        ConfigError: as :func:`hylorada_jax.io.bucket.refuse_unusable`.
    """
    if in_bucket and bucket.is_in_bucket(directory):
        bucket.refuse_unusable(directory, temporary_name())
        return
    if url := bucket.url_of(directory):
        raise CheckpointError(
            "An output must be a path of the file system, or of a run or an adapter one in a bucket, gs://.",
            url,
            "Choose a directory, such as one that a bucket is mounted on (gcsfuse), or copy the output there "
            "when it is written.",
        )
    try:
        place, missing = directory, []
        while (kind := kind_of(place)) is None:
            missing.append(place.name)
            place = place.parent
        for name in missing:  # each alone: below a directory that is missing, no name is too long
            kind_of(place / name)
        kind_of(directory / _ROOM)
        if not place.is_dir():
            found = f"{place} is a {kind}" + (" that leads to no directory" if kind == "link" else "")
        elif not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            found = f"{place}: no permission to write there, or a file system that is read-only"
        else:
            return
    except OSError as error:
        found = f"{directory}: {error.strerror}"
    rule = "The output must be a directory that can be written, or made."
    raise CheckpointError(rule, found, "Choose another output directory.")


def make_directory(path: Path) -> None:
    """Makes a directory and those that it is in, where they are not there; in a bucket there is none."""
    if not bucket.is_in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a directory that is empty; an OSError where that fails."""
    if bucket.is_in_bucket(path):
        bucket.remove(path)
    elif kind_of(path) == "directory":
        path.rmdir()
    else:
        path.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves the old content or the new, never a part.

    Args:
        path: in a directory that exists, or in a bucket. A link is replaced by the file; where it leads
            nothing is written.
        content: all of the file.

    Raises:
        OSError: it could not be written, as on a full disk, or what is there is no file; that is still there.
    """
    write_all({path: content})


def write_all(files: Mapping[Path, bytes]) -> None:
    """Writes files as :func:`write_whole` does, none before the disk has taken all of them.

    An interruption that finds some of them in their places ends when the others are there too.

    Args:
        files: content by path, in the order in which they appear; in a bucket one after the other.

    Raises:
        OSError: as of :func:`write_whole`; what was there is still there.
    """
    written: dict[Path, Path] = {}
    is_whole = False
    try:
        for path, content in files.items():
            if bucket.is_in_bucket(path):
                bucket.write(path, content)
                continue
            if path.exists() and not path.is_file():  # a rename would put the file in the place of /dev/null
                raise OSError(errno.EEXIST, "not a file", str(path))
            temporary = path.with_name(temporary_name())  # in the same directory, for a rename
            # Only if it is new, so through no link; with the modes of any new file.
            with temporary.open("xb") as file:
                written[path] = temporary
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        is_whole = True
        for path, temporary in written.items():
            temporary.replace(path)
    except BaseException:
        # New files beside old ones are neither what was there nor what was to be.
        has_begun = is_whole and not all(temporary.exists() for temporary in written.values())
        for path, temporary in written.items():
            if has_begun:
                with contextlib.suppress(OSError):  # it is in its place, or cannot be put there
                    temporary.replace(path)
            temporary.unlink(missing_ok=True)
        raise


def temporary_name() -> str:
    """A name that nobody can foresee; not after the target's, which can be as long as a name can be."""
    return f".hylorada-{secrets.token_hex(8)}"


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes a JSON file for people and programs to read, by :func:`write_whole`.

    Args:
        path: in a directory that exists.
        value: of JSON's types.

    Raises:
        OSError: it could not be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Names of files may have bytes that are not UTF-8: surrogates to Python, and escaped in JSON.
    write_whole(path, text.encode(errors="backslashreplace"))


def write_figure(path: Path, figure: "Figure") -> None:
    """Writes a plot as a PNG, by :func:`write_whole`: matplotlib leaves half a file where the disk is full.

    Args:
        path: in a directory that exists.
        figure: drawn.

    Raises:
        OSError: it could not be written.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())
