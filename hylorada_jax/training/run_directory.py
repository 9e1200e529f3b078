"""The directory of one run: what is in it, and who may write there.

A run begins where none of the names that it writes is taken; its run.json lists them. It is deleted by what
the library, orbax and TensorBoard call their files: anything else below those names is named in an error, and
nothing is changed. What lies beside them stays. The directory may be a link, or in a bucket; no link in it is
followed.

A run's run.json is renamed before anything else of it is deleted, and removed last: a deletion that was cut
short can be finished, and what it left is never taken for a run. recipe.json goes just before it: it may be
the recipe of the run that overwrites, which reads it again when it is started anew.

One trainer at a time is in the directory: the first process of its run locks it, with no file, and the system
unlocks it when that process ends, however it ends. No lock keeps another machine out, nor anybody out of a
bucket, of a file system without locks, or on Windows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io import bucket
from hylorada_jax.io.files import (
    TEMPORARY,
    Kind,
    any_path,
    kind_of,
    make_directory,
    refuse_unusable,
    remove,
    write_whole,
)
from hylorada_jax.placement.processes import are_several
from hylorada_jax.saved.adapter_files import CONFIG_NAME, IN_RUN, WEIGHTS_NAME
from hylorada_jax.text import short
from hylorada_jax.training.checkpoint import DAMAGED
from hylorada_jax.training.run_record import RunRecord, differences, read_record

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What lies in the directories of a run, as paths below them; a directory's ends with a slash.
_OF_ADAPTER = re.compile("|".join([re.escape(CONFIG_NAME), re.escape(WEIGHTS_NAME), TEMPORARY]))
_OF_TENSORBOARD = re.compile(r"events\.out\.tfevents\.[\d.]+", re.ASCII)
_UNFINISHED = r"(?:\.orbax-checkpoint-tmp|\.__lock)?"
_OF_A_STEP = (
    r"(?:_[A-Z_]+|_sharding|array_metadatas|commit_success\.txt|d|descriptor|manifest\.ocdbt|metadata"
    rf"|(?:ocdbt\.)?process_\w+|run|state|[0-9a-f]{{32}}){_UNFINISHED}"
)
_OF_CHECKPOINTS = re.compile(
    rf"\d+(?:_again)*{_UNFINISHED}/(?:{_OF_A_STEP}/){{0,4}}(?:{_OF_A_STEP})?", re.ASCII
)


class RunDirectory:
    """The places of a run's files.

    Attributes:
        path: the directory itself.
        run: run.json (:mod:`hylorada_jax.training.run_record`).
        deleted_run: run.json.deleted, which run.json becomes when the run is deleted, until all of it is.
        adapter: adapter/, the trained adapter.
        checkpoints: checkpoints/.
        recipe: recipe.json, what repeats the run.
        metrics: metrics.jsonl.
        loss_plot: loss.png.
        tensorboard: tensorboard/.
        nonfinite_batch: nonfinite_batch.npz, the batch of a loss that was NaN or infinite.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = any_path(path)
        self.run = self.path / "run.json"
        self.deleted_run = self.path / "run.json.deleted"
        self.adapter = self.path / IN_RUN
        self.checkpoints = self.path / "checkpoints"
        self.recipe = self.path / "recipe.json"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.tensorboard = self.path / "tensorboard"
        self.nonfinite_batch = self.path / "nonfinite_batch.npz"
        # What a run writes, and for a directory what that holds; deleted from the last to the first.
        self._places: dict[Path, re.Pattern[str] | None] = {
            self.recipe: None,
            self.adapter: _OF_ADAPTER,
            self.checkpoints: _OF_CHECKPOINTS,
            self.path / DAMAGED: _OF_CHECKPOINTS,
            self.tensorboard: _OF_TENSORBOARD,
            self.metrics: None,
            self.loss_plot: None,
            self.nonfinite_batch: None,
        }

    def refuse_unless(self, *, resume: bool, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
        """Refuses a directory that a run cannot be written to; changes nothing.

        Args:
            resume: it may hold a run.
            overwrite: it may hold a run, which will be deleted.
            inputs: files and directories that the new run is to read; asked for where a run will be deleted.

        Raises:
            CheckpointError: it cannot be made or written into, holds a run and nothing was said about it,
                holds something else of a name that a run writes, is another trainer's at the moment, or
                an input is among what will be deleted.
        """
        # Of several processes the first may be in it already when another one looks.
        with contextlib.nullcontext() if are_several() else _locked(self.path, exclusive=False):
            self._refuse_unless(resume=resume, overwrite=overwrite, inputs=inputs)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the directory, and keeps all other trainers out of it while the block runs.

        Raises:
            CheckpointError: another one is in it.
            OSError: it could not be made.
        """
        make_directory(self.path)
        with _locked(self.path, exclusive=True):
            yield

    def _refuse_unless(self, *, resume: bool, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
        """As :meth:`refuse_unless`, also for the trainer that is in it."""
        refuse_unusable(self.path, in_bucket=True)
        if bucket.is_in_bucket(self.path):
            bucket.refuse_undescribed(self.path)
        deleted: list[Path] = []
        try:
            there = self._there()
            held = self._held(there)
            self._refuse([place for place in held if len(held) > 1 or there[place] != "file"])
            record = read_record(held[0]) if held else None
            self._refuse(self._taken([] if record is None else record.writes, there))
            if overwrite and record is not None:
                deleted = [*held, *self._contents(record, there)]
        except OSError as error:
            rule = "The output directory must be readable."
            raise CheckpointError(rule, error, "Choose another output directory.") from error
        if deleted:
            self._refuse_lost(inputs, deleted)
        if held and not (resume or overwrite):
            raise CheckpointError(
                "A run is never overwritten unasked.",
                f"{self.path} holds a run",
                "Go on with it by resume (--resume), delete it by overwrite (--overwrite), or choose another "
                "directory.",
            )
        if held == [self.deleted_run] and resume:
            raise CheckpointError(
                "A run that is resumed must be whole.",
                f"{self.path}, where the deletion of a run was cut short",
                "Start again with overwrite (--overwrite), which deletes the rest.",
            )

    def open(
        self,
        identity: Mapping[str, Any],
        recorded: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        resume: bool,
        overwrite: bool,
    ) -> RunRecord:
        """Makes the directory ready for a run, new or resumed.

        Args:
            identity: what the run computes, as plain JSON types.
            recorded: what it runs on, free to differ.
            defaults: of the settings in ``identity``: what those are that the run there does not have yet.
            resume: the directory may hold a run, which must have the same identity.
            overwrite: a run in the directory is deleted, and nothing else.

        Returns:
            The content of the run's run.json.

        Raises:
            CheckpointError: as :meth:`refuse_unless` says, but for other trainers, which :meth:`alone` keeps
                out; or the run that is there is another one.
            OSError: something could not be deleted or written.

        Warns:
            UserWarning: the run was started on something else.
        """
        self._refuse_unless(resume=resume, overwrite=overwrite)
        # Through JSON, so that a tuple equals the list that is read back.
        plain = json.loads(json.dumps({"identity": identity, "recorded": recorded}))
        names = [place.name for place in self._places]
        run = RunRecord("hylorada run", 1, names, **plain, id=secrets.token_hex(8))
        if overwrite:
            self._delete()
        if kind_of(self.run):
            return self._same_run(run, defaults)
        make_directory(self.path)
        run.write(self.run)
        return run

    def _there(self) -> dict[Path, Kind]:
        """What is in the directory, under the names that a run writes at least."""
        if bucket.is_in_bucket(self.path):  # which has a list of it, and answers slowly
            return {**bucket.children(self.path)}
        places = (self.deleted_run, self.run, *self._places)
        return {place: kind for place in places if (kind := kind_of(place))}

    def _held(self, there: Collection[Path]) -> list[Path]:
        """run.json, under the one name or the other; under both where somebody has put one back.

        In a bucket it is copied to the other name and then deleted, so a kill may leave two that are equal.
        """
        held = [place for place in (self.deleted_run, self.run) if place in there]
        if len(held) == 2 and bucket.is_in_bucket(self.path) and len({p.read_bytes() for p in held}) == 1:
            return held[:1]
        return held

    def _taken(self, listed: Collection[str], there: Mapping[Path, Kind]) -> list[Path]:
        """What has the name of something that a run writes, and is not that."""
        expected = {
            place: ("directory" if within else "file") if place.name in listed else None
            for place, within in self._places.items()
        }
        return [place for place, kind in expected.items() if there.get(place) not in (None, kind)]

    def _contents(self, record: RunRecord, there: Collection[Path]) -> list[Path]:
        """All that a run wrote but its run.json, what is in a directory before the directory."""
        own: list[Path] = []
        others: list[Path] = []
        for place, within in self._places.items():
            if place.name in record.writes and place in there:
                own.append(place)
                for path, written in _below(place, within) if within else ():
                    (own if written else others).append(path)
        self._refuse(others)
        return own[::-1]

    def _delete(self) -> None:
        """Deletes the run that is there, if any."""
        there = self._there()
        if not (held := self._held(there)):
            return
        contents = self._contents(read_record(held[0]), there)
        if bucket.is_in_bucket(held[0]):  # where nothing is renamed
            write_whole(self.deleted_run, held[0].read_bytes())
            remove(self.run)
        else:
            held[0].rename(self.deleted_run)
        for path in contents:
            # What was put into a directory since it was checked keeps the directory, with an error.
            remove(path)
        remove(self.deleted_run)

    def _refuse(self, alien: Sequence[Path]) -> None:
        """Refuses what is in the way of a run, if anything is."""
        if not alien:
            return
        found = [f"{path.relative_to(self.path)} (a {kind_of(path)})" for path in alien]
        raise CheckpointError(
            "What no run wrote is never overwritten or deleted.",
            f"{self.path} holds {short(found)}" + ("" if self._held(self._there()) else ", and no run.json"),
            "Move that away, or choose another directory.",
        )

    def _refuse_lost(self, inputs: Iterable[Path], deleted: Iterable[Path]) -> None:
        """Refuses to delete what the new run is to read."""
        places = {_place(path) for path in deleted}
        if lost := [str(path) for path in inputs if (place := _place(path)) and place in places]:
            raise CheckpointError(
                "A run is not overwritten by one that reads its files.",
                f"{short(lost)}, in the run of {self.path}",
                "Choose another output directory, or copy what is read elsewhere and name the copy.",
            )

    def _same_run(self, run: RunRecord, defaults: Mapping[str, Any]) -> RunRecord:
        """The run that is there, which must be the one at hand."""
        there = read_record(self.run)
        differing = differences(there.identity, run.identity, defaults)
        moved = differences(there.recorded, run.recorded)
        names = {"start": "the model's adapters before the first step"}
        was = "; ".join(
            f"{names.get(key, key)}: {then} in {self.run}, {now} now" for key, then, now in differing
        )
        changed = "; ".join(f"{key} {then}, now {now}" for key, then, now in moved if key != "model")
        if was:
            has_adapter = (self.adapter / WEIGHTS_NAME).exists()
            raise CheckpointError(
                "A run is resumed with the base model, the settings and the data it was started with.",
                was,
                "Resume with what it was started with, or start a new run in another directory"
                + (", which may start from this one's adapter." if has_adapter else "."),
            )
        if changed:
            warnings.warn(
                f"{self.path} was started with {changed}: "
                "the last bits may differ from those of a run without interruption",
                stacklevel=4,
            )
        return there


@contextlib.contextmanager
def _locked(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Locks a run's directory while the block runs, where that can be; a CheckpointError where it is locked.

    Args:
        directory: exists or not.
        exclusive: against every other lock, or else against those that are exclusive.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None and not bucket.is_in_bucket(directory):
            try:
                opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
                stack.callback(fcntl.flock, opened, fcntl.LOCK_UN)  # at once, though a fork may have it open
            except BlockingIOError as error:
                listing = f"lsof {shlex.quote(str(directory))}"
                raise CheckpointError(
                    "A run's directory is written by one trainer at a time.",
                    f"{directory}, where another one is training",
                    f"Wait until it ends, end it (`{listing}` shows it), or choose another directory.",
                ) from error
            except (OSError, ValueError):  # no such directory, or a file system without locks
                pass
        yield


def _place(path: Path) -> object:
    """What a file or a directory has under all names that lead to it, but hard links; None for none."""
    if bucket.is_in_bucket(path):
        return str(path).rstrip("/")
    try:
        real = Path(os.path.realpath(path))
        return tuple((found.st_dev, found.st_ino) for found in (real.stat(), real.parent.stat()))
    except (OSError, ValueError):
        return None


def _below(place: Path, written: re.Pattern[str]) -> Iterator[tuple[Path, bool]]:
    """All that is in a directory, and whether it is what the pattern says; only what is so is looked into."""
    if bucket.is_in_bucket(place):
        for path in bucket.files(place):
            yield path, bool(written.fullmatch(path.relative_to(place).as_posix()))
        return
    stack = [place]
    while stack:
        for path in stack.pop().iterdir():
            kind = kind_of(path)
            name = path.relative_to(place).as_posix() + ("/" if kind == "directory" else "")
            own = kind in ("file", "directory") and bool(written.fullmatch(name))
            yield path, own
            if own and kind == "directory":
                stack.append(path)
