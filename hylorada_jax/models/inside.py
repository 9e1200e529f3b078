"""Which files belong to the directory of a model or an adapter: those in it, or in the Hub's cache."""

import os
from collections.abc import Iterator
from pathlib import Path

from hylorada_jax.errors import HyLoRADAError, ModelError


def file_inside(directory: Path, name: str | Path, error: type[HyLoRADAError] = ModelError) -> Path | None:
    """A file of the directory of a model or an adapter.

    Who makes a directory can link from it to any file of those who use it. What is read of such a file, or
    copied into a merged model or another adapter, is no longer private.

    Args:
        directory: the model's or the adapter's; it may itself be a link, such as to a snapshot in the Hub's
            cache.
        name: of the file, relative to the directory.
        error: the class of the error.

    Returns:
        The file, not resolved; None where there is none, or a directory.

    Raises:
        HyLoRADAError: of the class given: it is outside, by its name or through a link; or it is a pipe, a
            socket or a device.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     (Path(place) / "own.json").symlink_to("/etc/hosts")
        ...     file_inside(Path(place), "own.json")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        hylorada_jax.errors.ModelError: The files of a model or an adapter must lie in its directory...
    """
    file = directory / name
    if not os.path.exists(file) or os.path.isdir(file):
        return None
    real = Path(os.path.realpath(file))
    if not any(real.is_relative_to(root) for root in _roots(directory)):
        raise error(
            "The files of a model or an adapter must lie in its directory, or in the Hub's cache.",
            f"{file}, which is {real}",
            "If the file is meant to be part of it, put a copy in the directory.",
        )
    if not os.path.isfile(real):
        rule = "The files of a model or an adapter must be regular files."
        raise error(rule, file, "Remove it from the directory.")
    return file


def files_inside(directory: Path, *patterns: str) -> list[Path]:
    """The files of a model's directory that fit a pattern, in order; see :func:`file_inside`."""
    found = (path.relative_to(directory) for pattern in patterns for path in sorted(directory.glob(pattern)))
    return [file for name in found if (file := file_inside(directory, name))]


def _roots(directory: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(directory))
    yield real
    # A cache keeps the files of models--…/snapshots/… in models--…/blobs, wherever it lies.
    yield from (parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")
    from huggingface_hub import constants

    yield Path(os.path.realpath(constants.HF_HUB_CACHE))
