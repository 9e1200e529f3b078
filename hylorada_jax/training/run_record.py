"""run.json: marks a directory as a run's, lists what the run writes there, and says what the run is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.files import write_json
from hylorada_jax.io.reading import checked, read_json


class RunRecord(msgspec.Struct, frozen=True):
    """The content of run.json.

    Attributes:
        format: that this library wrote it.
        format_version: of these keys.
        writes: the names in the directory that were free when the run began, and have been the run's since.
        identity: what the run computes (:mod:`hylorada_jax.training.identity`), as plain JSON types.
        recorded: what it runs on, free to differ.
        id: by which others know the run; None of one that was begun before runs had any.
    """

    format: Literal["hylorada run"]
    format_version: Literal[1]
    writes: list[str]
    identity: dict[str, Any]
    recorded: dict[str, Any]
    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")] | None = None

    def write(self, path: Path) -> None:
        """Writes run.json, whole; an OSError where that fails."""
        write_json(path, msgspec.structs.asdict(self))


def read_record(path: Path) -> RunRecord:
    """Reads what :meth:`RunRecord.write` wrote.

    Args:
        path: of run.json.

    Raises:
        CheckpointError: it is damaged, of another form, or of another version.
    """
    rule = f"{path.name} must be what a run of this version of hylorada wrote."
    remedy = "Put an intact copy in its place, or choose another output directory."
    body = read_json(path, rule, CheckpointError, remedy)
    return checked(body, RunRecord, rule, CheckpointError, remedy, path)


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> list[tuple[str, Any, Any]]:
    """What differs between two trees of plain JSON types; a value that is None might as well be absent.

    Args:
        then: of run.json.
        now: of the run at hand.
        defaults: a tree of what is meant where ``then`` has nothing.

    Returns:
        (name, then, now) of each value that differs, by name.

    Example:
        >>> differences({"training": {"seed": 0, "old": None}}, {"training": {"seed": 3}})
        [('training.seed', 0, 3)]
    """
    absent, before, after = "(absent)", _flat(defaults) | _flat(then), _flat(now)
    both = ((key, before.get(key, absent), after.get(key, absent)) for key in sorted({*before, *after}))
    off = (None, absent)
    return [(key, old, new) for key, old, new in both if old != new and not (old in off and new in off)]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    branches = [("", tree)]
    while branches:  # and no recursion, for a file can be nested deeper than Python calls
        prefix, branch = branches.pop()
        for key, value in branch.items():
            if isinstance(value, dict):
                branches.append((f"{prefix}{key}.", value))
            else:
                flat[f"{prefix}{key}"] = value
    return flat
