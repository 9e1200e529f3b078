"""Paths as users type them, and writing a file whole."""

import os
from pathlib import Path


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


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves the old content or the new, never a part.

    Args:
        path: in a directory that exists.
        content: all of the file.

    Raises:
        OSError: it could not be written, as on a full disk; the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
