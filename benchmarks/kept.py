"""The runs of an experiment as files: what was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.command import started
from benchmarks.experiment import differences
from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.files import write_json

Record = dict[str, Any]


def stored(
    file: Path, settings: Mapping[str, Any], remedy: str, since: Collection[str] = ()
) -> Record | None:
    """The record in a file; None where there is no file.

    Args:
        file: of a run.
        settings: that it must be of.
        remedy: of the error.
        since: names of settings that the first records lack, which are taken as they are.

    Raises:
        CheckpointError: it is of other settings.
    """
    if not file.exists():
        return None
    record = json.loads(file.read_text("utf-8"))
    theirs = record["settings"]
    known = {name: value for name, value in settings.items() if name in theirs or name not in since}
    if changed := differences(theirs, known):
        raise CheckpointError("A directory holds the runs of one experiment.", f"{file}: {changed}", remedy)
    return record


def written(file: Path, settings: Mapping[str, Any], command: str, result: Record) -> Record:
    """The record of a run, now in its file, with what started it and what it ran on."""
    from parity_tests.environment import environment

    record = {"settings": settings, "command": command, "environment": environment(), "result": result}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    return record


def kept(
    directory: Path, method: str, seed: int, settings: Mapping[str, Any], compute: Callable[[], Record]
) -> Record:
    """The record of a run, from its file where there is one.

    Args:
        directory: of the runs.
        method: what is trained; with the seed, the file's name.
        seed: of the run.
        settings: what else decides the result.
        compute: gives the result.

    Raises:
        CheckpointError: the file is of other settings.
    """
    settings = {**settings, "method": method, "seed": seed}
    file = directory / f"{method.replace(' ', '-')}-seed{seed}.json"
    if (record := stored(file, settings, "Choose another --output.")) is not None:
        return record
    print(f"{method}, seed {seed} …", flush=True)
    return written(file, settings, started(), compute())


def by_method(runs: list[Record]) -> dict[str, list[Record]]:
    """The records of each method, in the order of the first ones."""
    found: dict[str, list[Record]] = {}
    for record in runs:
        found.setdefault(record["settings"]["method"], []).append(record)
    return found
