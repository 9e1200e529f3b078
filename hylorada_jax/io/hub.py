"""The Hugging Face Hub: the one place that fetches anything from it, and says so."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hylorada_jax.io.files import user_path
from hylorada_jax.terminal import say_once

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_offline = False


def is_hub_name(name: str) -> bool:
    """Whether the Hub is asked for a base model of this name: no path here has it."""
    return bool(_NAME.fullmatch(name)) and not os.path.exists(user_path(name))


def fetched_first(directory: Path, remedy: str) -> str:
    """The remedy for an adapter's files that are not in a directory, which may be a Hub name.

    Args:
        directory: as the user gave it.
        remedy: for one that is not.

    Example:
        >>> fetched_first(Path("owner/adapter"), "Check the path.")
        'Check the path. One on the Hub is fetched first: `hf download owner/adapter --local-dir DIRECTORY`.'
    """
    fetching = f" One on the Hub is fetched first: `hf download {directory} --local-dir DIRECTORY`."
    return remedy + fetching * is_hub_name(str(directory))


def recorded_name(name: str) -> str:
    """The name of a base model as adapters record it: elsewhere the Hub is not to be asked for a path here.

    Args:
        name: as the user gave it.

    Example:
        >>> recorded_name("owner/model")
        'owner/model'
    """
    return f"./{name}" if _NAME.fullmatch(name) and not is_hub_name(name) else name


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """A context in which nothing is contacted: models and datasets of the Hub come from the local cache.

    It holds for the whole process, all threads, until it is left. The environment variable HF_HUB_OFFLINE=1
    does the same for a whole program.

    Example:
        with hylorada_jax.offline():
            model = load_model("Qwen/Qwen2.5-0.5B")  # from the cache, or a ModelError
    """
    global _offline
    before, _offline = _offline, True
    try:
        yield
    finally:
        _offline = before


def is_offline() -> bool:
    """Whether nothing may be contacted, by :func:`offline` or by the environment."""
    from huggingface_hub import constants

    # huggingface_hub reads the environment when it is imported; a notebook sets it later.
    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return _offline or said or bool(constants.HF_HUB_OFFLINE)


def fetch(name: str, patterns: Sequence[str], kind: Literal["model", "dataset"] = "model") -> Path:
    """The directory of the local cache that holds a repository of the Hub, downloaded if need be.

    The first time in a process that one is to be contacted for, it is named on stderr.

    Args:
        name: "owner/name".
        patterns: globs of the files that are wanted.
        kind: what it is.

    Raises:
        LocalEntryNotFoundError: it is not in the cache, and the Hub cannot or must not be reached.
        Exception: of huggingface_hub's many kinds.
    """
    # Imported here: it takes half a second.
    from huggingface_hub import snapshot_download

    local = _is_local(name, kind)
    # Told each time: huggingface_hub's own switch is read once, when it is imported.
    return Path(snapshot_download(name, repo_type=kind, allow_patterns=[*patterns], local_files_only=local))


def dataset(name: str, configuration: str | None, split: str) -> Any:
    """A split of a dataset of the Hub, from the cache of the datasets library or by way of it.

    It is announced as by :func:`fetch`. No code of its repository is run.

    Args:
        name: "owner/name".
        configuration: one of its own, or None for its default.
        split: one of its splits, or a part or a sum of them, as "train[:1000]".

    Returns:
        A ``datasets.Dataset``.

    Raises:
        ImportError: the library is not installed.
        Exception: of the library's many kinds.
    """
    from datasets import config, load_dataset

    # Its switches are read from the environment when it is imported. It counts downloads on another host.
    local = config.HF_HUB_OFFLINE or _is_local(name, "dataset")
    changes = {"HF_HUB_OFFLINE": local, "HF_UPDATE_DOWNLOAD_COUNTS": False}
    before = {switch: getattr(config, switch) for switch in changes}
    try:
        vars(config).update(changes)
        # Versions from 4 on run no code; older ones would ask.
        return load_dataset(name, configuration, split=split, trust_remote_code=False)
    finally:
        vars(config).update(before)


def _is_local(name: str, kind: str) -> bool:
    """Whether nothing may be contacted; where something may, it is announced."""
    local = is_offline()
    if not local:
        say_once(f"{kind} {name}: from the Hugging Face Hub")
    return local
