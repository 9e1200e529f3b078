"""The directory of one run: what is in it, and who may write there."""

from __future__ import annotations

import json
import shutil
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
        run: run.json, what the run is: its fingerprint.
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

    def open(self, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Makes the directory ready for a run, new or resumed.

        Args:
            fingerprint: what the run computes, as plain JSON types.
            resume: the directory may hold a run, which must have the same fingerprint.
            overwrite: a run in the directory is deleted; other files are left alone.

        Raises:
            CheckpointError: a run is there and nothing was said about it, or it is another run.
        """
        self.refuse_unless(resume=resume, overwrite=overwrite)
        # Through JSON, so that a tuple equals the list that is read back.
        fingerprint = json.loads(json.dumps(fingerprint))
        if overwrite:
            # run.json last: a kill in between leaves a directory that still counts as a run.
            for place in reversed(self._all):
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if self.run.exists():
            self._check_same_run(fingerprint)
        elif self.holds_a_run:
            rule = "A run that is resumed must have its run.json"
            raise CheckpointError(
                rule, f"{self.run} is missing", "Put it back, or start again with overwrite."
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(fingerprint, indent=2, ensure_ascii=False) + "\n"
            write_whole(self.run, text.encode(errors="backslashreplace"))

    def _check_same_run(self, fingerprint: Mapping[str, Any]) -> None:
        try:
            there = json.loads(self.run.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            rule = "run.json must be readable"
            raise CheckpointError(rule, f"{self.run}: {error}", "Put an intact copy in its place.") from error
        ours, theirs = _flat(fingerprint), _flat(there)
        absent = "(absent)"
        if differing := sorted(
            key for key in ours | theirs if ours.get(key, absent) != theirs.get(key, absent)
        ):
            raise CheckpointError(
                "A run is resumed with the settings and the data it was started with",
                "; ".join(
                    f"{key}: {theirs.get(key, absent)} in {self.run}, {ours.get(key, absent)} now"
                    for key in differing
                ),
                "Resume with the same settings and data, or choose another output directory.",
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
