"""The directory of one run: what is in it, and who may write there."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.files import user_path, write_whole
from hylorada_jax.training.checkpoint import DAMAGED


class RunDirectory:
    """The places of a run's files.

    Attributes:
        path: the directory itself.
        run: run.json, what the run is and what it runs on (:mod:`hylorada_jax.training.identity`).
        adapter: adapter/, the trained adapter.
        checkpoints: checkpoints/.
        metrics: metrics.jsonl.
        loss_plot: loss.png.
        tensorboard: tensorboard/.
        nonfinite_batch: nonfinite_batch.npz, the batch of a loss that was NaN or infinite.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.run = self.path / "run.json"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.tensorboard = self.path / "tensorboard"
        self.nonfinite_batch = self.path / "nonfinite_batch.npz"
        self._all = [
            self.run, self.adapter, self.checkpoints, self.metrics, self.loss_plot, self.tensorboard,
            self.nonfinite_batch, self.path / DAMAGED,
        ]  # fmt: skip

    @property
    def holds_a_run(self) -> bool:
        """Whether any of a run's files is there."""
        return any(place.exists() for place in self._all)

    def refuse_unless(self, *, resume: bool, overwrite: bool) -> None:
        """Raises a CheckpointError if a run is there and nothing was said about it; changes nothing."""
        try:
            taken, holds_a_run = self.path.exists() and not self.path.is_dir(), self.holds_a_run
        except OSError as error:  # the name is too long, or a directory above is closed to this user
            rule = "The output directory must be one that can be made"
            raise CheckpointError(rule, error, "Choose another output directory.") from error
        if taken:
            rule = "The output directory must be a directory"
            raise CheckpointError(rule, self.path, "Choose another output directory.")
        if holds_a_run and not (resume or overwrite):
            raise CheckpointError(
                "A run is never overwritten unasked",
                f"{self.path} holds a run",
                "Go on with it by resume (--resume), delete it by overwrite (--overwrite), or choose another "
                "directory.",
            )

    def open(
        self,
        identity: Mapping[str, Any],
        recorded: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """Makes the directory ready for a run, new or resumed.

        Args:
            identity: what the run computes, as plain JSON types.
            recorded: what it runs on, free to differ.
            resume: the directory may hold a run, which must have the same identity.
            overwrite: a run in the directory is deleted; other files are left alone.

        Raises:
            CheckpointError: a run is there and nothing was said about it, or it is another run.

        Warns:
            UserWarning: the run was started on something else.
        """
        self.refuse_unless(resume=resume, overwrite=overwrite)
        # Through JSON, so that a tuple equals the list that is read back.
        run = json.loads(json.dumps({"identity": identity, "recorded": recorded}))
        if overwrite:
            # run.json last: a kill in between leaves a directory that still counts as a run.
            for place in reversed(self._all):
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if self.run.exists():
            self._check_same_run(run)
        elif self.holds_a_run:
            rule = "A run that is resumed must have its run.json"
            raise CheckpointError(
                rule, f"{self.run} is missing", "Put it back, or start again with overwrite."
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
            write_whole(self.run, text.encode(errors="backslashreplace"))

    def _check_same_run(self, run: Mapping[str, Any]) -> None:
        try:
            there = json.loads(self.run.read_text(encoding="utf-8"))
            theirs, recorded = _flat(there["identity"]), _flat(there["recorded"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            rule = "run.json must be readable"
            raise CheckpointError(
                rule, f"{self.run}: {error!r}", "Put an intact copy in its place."
            ) from error
        if differing := _differences(theirs, _flat(run["identity"])):
            raise CheckpointError(
                "A run is resumed with the base model, the settings and the data it was started with",
                "; ".join(f"{key}: {then} in {self.run}, {now} now" for key, then, now in differing),
                "Resume with what it was started with, or choose another output directory.",
            )
        moved = _differences(recorded, _flat(run["recorded"]))
        if told := [f"{key} {then}, now {now}" for key, then, now in moved if key != "model"]:
            warnings.warn(
                f"{self.path} was started with {'; '.join(told)}: "
                "the last bits may differ from those of a run without interruption",
                stacklevel=4,
            )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of each value that differs."""
    absent = "(absent)"
    both = ((key, then.get(key, absent), now.get(key, absent)) for key in sorted({*then, *now}))
    return [(key, before, after) for key, before, after in both if before != after]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
