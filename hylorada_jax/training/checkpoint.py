"""Checkpoints that survive a kill, a full disk and damage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import orbax.checkpoint as ocp

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io import bucket
from hylorada_jax.io.files import kind_of, make_directory
from hylorada_jax.io.reading import MAX_JSON_BYTES
from hylorada_jax.placement.processes import are_several, everywhere, on_first
from hylorada_jax.training.step import TrainState

DAMAGED = "damaged_checkpoints"
# What orbax, etils and tensorstore read in a path as it is, and not as a pattern, a URL or an escape.
_PLAIN = re.compile(r"[\w./-]+", re.ASCII)
_STEP = re.compile("0|[1-9][0-9]*")  # as orbax writes it
_MARK = "commit_success.txt"  # orbax's, of a checkpoint in a bucket that is complete


class _Position(msgspec.Struct):
    next_index: Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Run(msgspec.Struct):
    """What a checkpoint has beside the state."""

    data: _Position
    digest: str


@dataclasses.dataclass
class _Newest(ocp.checkpoint_managers.PreservationPolicy):
    """What orbax keeps: the newest, and with each what was the best when it was saved.

    Where the newest is damaged, the run goes on from the one before it, which needs the best of its own time.
    """

    number: int
    bests: Collection[int] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, in the order of their steps, whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = steps[-self.number :]
        kept = {*newest, *(max((s for s in self.bests if s <= step), default=step) for step in newest)}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run, written in the background.

    A checkpoint is complete or absent: orbax writes it beside its place and renames it, or in a bucket writes
    a last file that marks it. It holds the state (adapters, optimizer, step, seed), the position in the data,
    and a digest of the state, so that damage that still reads is noticed too. Use as a context manager;
    leaving it waits for the checkpoint under way.

    Each process writes the parts of the state that its devices hold, and reads those that they shall hold,
    whoever wrote them. So all of them save, wait and restore together, in one directory.

    Args:
        directory: made if it does not exist; perhaps in a bucket.
        keep: number of newest checkpoints kept.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        # orbax insists on an absolute path
        self._directory = directory if bucket.is_in_bucket(directory) else directory.absolute()
        self._policy = _Newest(keep)
        self._on_exit = contextlib.ExitStack()

    def __enter__(self) -> Checkpoints:
        # orbax logs a failure several times, with its stack; what we raise says it once.
        logging.getLogger("absl").addFilter(_not_orbax)
        self._on_exit.callback(logging.getLogger("absl").removeFilter, _not_orbax)
        _ignore_the_rest()
        make_directory(self._directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._orbax_directory = self._plain_name()
        self._manager = ocp.CheckpointManager(self._orbax_directory, options=options)
        return self

    def _plain_name(self) -> Path:
        """The directory, under a name that orbax does not take for a pattern ("lr=[1e-4,2e-4]")."""
        if bucket.is_in_bucket(self._directory) or _PLAIN.fullmatch(str(self._directory)):
            return self._directory
        link = Path(self._on_exit.enter_context(tempfile.TemporaryDirectory())) / self._directory.name
        link.symlink_to(self._directory, target_is_directory=True)
        return link

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._on_exit:
            try:
                # With an error on its way, one of the background must not take its place.
                if error is None:
                    self.wait()
                elif are_several():  # closing would wait for those that may be gone
                    return
                self._manager.close()
            except Exception:
                if error is None:
                    raise

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        if bucket.is_in_bucket(self._directory):
            marks = [path for path in bucket.files(self._directory) if path.name == _MARK]
            names = [path.parent.name for path in marks if path.parent.parent == self._directory]
        else:
            names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    @property
    def last(self) -> str:
        """The last complete checkpoint, in words."""
        steps = self.steps
        return f"the checkpoint of step {steps[-1]} in {self._directory}" if steps else "no checkpoint yet"

    def save(self, state: TrainState, *, data: dict[str, Any], bests: Collection[int] = ()) -> None:
        """Writes a checkpoint in the background.

        Args:
            state: copied before this returns, so that the next step may consume it.
            data: the position in the data, as the iterator's ``get_state`` gives it.
            bests: steps that were the best when they were saved; for each of the newest checkpoints, the last
                of them up to it is kept too.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written.
        """
        self._policy.bests = bests
        run = {"data": data, "digest": _digest(state, data)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        step = int(state.step)
        try:
            saved = self._manager.save(step, args=items)
        except Exception as error:  # whatever the file system, tensorstore and orbax may raise
            raise self._unwritten(error) from error
        if not saved:
            raise self._unwritten(FileExistsError(f"step {step} is not later than all that are there"))

    def wait(self) -> None:
        """Returns when the checkpoint under way is complete; a CheckpointError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole.

        Damaged ones that are newer are moved to damaged_checkpoints/ beside the directory, with a warning.

        Args:
            like: a state of the same tree, shapes, dtypes and seed.

        Returns:
            The state and the position in the data; None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        damage: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state, data = self._read(step, like)
            except Exception as error:
                damage[step] = self._in_words(error)
                continue
            self._set_aside(damage, used=step)
            return state, data
        if not damage:
            return None
        raise CheckpointError(
            f"One of the checkpoints in {self._directory} must be readable and of this run.",
            "; ".join(f"step {step}: {what}" for step, what in damage.items()),
            "Start again with overwrite (--overwrite), or put an intact copy in its place.",
        )

    def state_of(self, step: int, like: TrainState) -> TrainState:
        """The state of a step whose checkpoint was kept.

        Args:
            step: one of :attr:`steps`.
            like: a state of the same tree, shapes, dtypes and seed.

        Raises:
            CheckpointError: it cannot be used; it stays where it is.
        """
        try:
            return self._read(step, like)[0]
        except Exception as error:
            raise CheckpointError(
                f"The best checkpoint in {self._directory} must be readable and of this run.",
                f"step {step}: {self._in_words(error)}",
                "Resume (--resume) with an intact copy in its place, or with keep='last' (--keep last): it "
                "ends with the adapter of the last step.",
            ) from error

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        found: tuple[TrainState, _Run] | str
        try:
            found = self._read_here(step, like)
        except Exception as error:  # damage shows as any of a dozen exceptions of orbax and tensorstore
            found = self._in_words(error)
        # Damage to the part of one process is damage to all, and the digest is computed by all together.
        errors = [said for said in everywhere(found if isinstance(found, str) else None) if said]
        if errors or isinstance(found, str):
            raise ValueError(errors[0])
        state, run = found
        data = msgspec.to_builtins(run.data)
        if _digest(state, data) != run.digest:
            raise ValueError("its content does not match its digest")
        if state.seed != like.seed:
            raise ValueError(f"its seed is {state.seed}, the run's is {like.seed}")
        return state, data

    def _read_here(self, step: int, like: TrainState) -> tuple[TrainState, _Run]:
        """What this process reads: item by item, for orbax's manager would wait for a process that failed."""
        _refuse_unreadable(self._directory / str(step))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = self._orbax_directory / str(step)
        state = ocp.StandardCheckpointHandler().restore(
            items / "state", args=ocp.args.StandardRestore(shapes)
        )
        run = ocp.JsonCheckpointHandler().restore(items / "run", args=ocp.args.JsonRestore())
        return state, msgspec.convert(run, _Run)

    def _set_aside(self, damage: dict[int, str], *, used: int) -> None:
        """Moves damaged checkpoints away, for their steps will be written again."""
        if not damage:
            return
        for step, what in damage.items():
            target = on_first(functools.partial(self._moved, step))
            warnings.warn(
                f"the checkpoint of step {step} is damaged ({what}); going on from step {used}. "
                f"It was moved to {target}",
                stacklevel=3,
            )
        self._manager.reload()

    def _moved(self, step: int) -> Path:
        target = self._directory.parent / DAMAGED / str(step)
        while kind_of(target):
            target = target.with_name(target.name + "_again")
        source = self._directory / str(step)
        if bucket.is_in_bucket(source):
            bucket.move(source, target)
            return target
        target.parent.mkdir(exist_ok=True)
        return source.rename(target)

    def _in_words(self, error: Exception) -> str:
        """An error in one line of bearable length: tensorstore's run over pages, with the cause within."""
        text = str(error).strip().split("\n")[0].replace(str(self._orbax_directory), str(self._directory))
        text = text or type(error).__name__
        if len(text) <= 300:
            return text
        of_the_system = re.search(r"[^:]{3,80}(?= \[os_error_code)", text)
        return f"{text[:120]} … {of_the_system[0].strip() if of_the_system else text[-160:]}"

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            "A checkpoint must be written completely.",
            self._in_words(error),
            f"Free some space, then go on with resume (--resume) from {self.last}.",
        )


def _refuse_unreadable(step: Path) -> None:
    """Raises a ValueError for a checkpoint with what orbax would wait for, or fill the memory with."""
    if bucket.is_in_bucket(step):
        for path, size in bucket.files(step).items():
            if path.parent.name != "d" and size > MAX_JSON_BYTES:
                raise ValueError(f"{path.relative_to(step)} is larger than {MAX_JSON_BYTES:,} bytes")
        return
    for path in step.rglob("*"):
        # Arrays are in d/, and read by the shapes that the run's own have.
        limit = math.inf if path.parent.name == "d" else MAX_JSON_BYTES
        if not path.is_dir() and not (path.is_file() and path.stat().st_size <= limit):
            raise ValueError(f"{path.relative_to(step)} is not a file of at most {MAX_JSON_BYTES:,} bytes")


def _digest(state: TrainState, data: dict[str, Any]) -> str:
    """A fingerprint of every leaf's place, shape, dtype and bytes, and of the position in the data."""
    sha = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    for (path, leaf), checksum in zip(leaves, sums, strict=True):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {checksum}".encode())
    return sha.hexdigest()


@jax.jit
def _checksums(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """For each leaf a number of its bits, the same however it is cut over devices.

        Σᵢ mix(bitsᵢ + φ·mix(i))   modulo 2³²

    Each device sums up its part, and nothing is gathered. The mix is a bijection, so that no change of one
    element goes unnoticed.

    Source: the finalizer of MurmurHash3 (Appleby).
    """

    def mix(x: jax.Array) -> jax.Array:
        x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
        x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
        return x ^ x >> 16

    def checksum(leaf: jax.Array) -> jax.Array:
        width = min(8 * leaf.dtype.itemsize, 32)  # of 64 bits it makes two of 32, on an axis of their own
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
        place = jnp.uint32(0)
        for axis, length in enumerate(bits.shape):
            place = place * length + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(mix(bits + jnp.uint32(0x9E3779B9) * mix(place)), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _ignore_the_rest() -> None:
    """Silences, for good, what becomes of the other reads and writes when one has failed.

    orbax raises for the first array that it cannot read or write, and closes its event loop. Those of the
    others fail later, in threads: their futures are never asked, or find the loop closed, and orbax's
    coroutines for them are thrown away, and raise at that, or were never begun. Each would put a stack or a
    warning on stderr.
    """
    never_begun = r"coroutine '(async_(de)?serialize|Store\._get_array_metadatas)"
    warnings.filterwarnings("ignore", never_begun, RuntimeWarning)
    logging.getLogger("asyncio").addFilter(_not_of_a_checkpoint)  # adding it again changes nothing
    if getattr(sys.unraisablehook, "func", None) is not _report_unless_late:
        sys.unraisablehook = functools.partial(_report_unless_late, sys.unraisablehook)


def _not_of_a_checkpoint(record: logging.LogRecord) -> bool:
    message = record.getMessage()  # with the future or the task, and its exception
    return "tensorstore" not in message and "orbax" not in message


def _report_unless_late(report: Callable[[Any], object], unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    if str(unraisable.exc_value) != "Event loop is closed" and "orbax" not in getattr(
        code, "co_filename", ""
    ):
        report(unraisable)
