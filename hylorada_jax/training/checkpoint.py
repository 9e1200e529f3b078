"""Checkpoints that survive a kill, a full disk and damage."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as dump_safetensors

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.adapter_files import short
from hylorada_jax.io.files import write_whole
from hylorada_jax.training.devices import replicated
from hylorada_jax.training.step import TrainState

DAMAGED = "damaged_checkpoints"
_NAME = re.compile(r"(\d+)\.safetensors")


class Checkpoints:
    """The checkpoints of one run, each a file ``<step>.safetensors``, written in the background.

    A checkpoint is complete or absent: it is written beside its place and renamed. It holds the state
    (adapters, optimizer, step, seed), the position in the data, and a digest of both, so that damage that
    still reads is noticed too. Use as a context manager; leaving it waits for the checkpoint under way.

    Not by orbax: it reads a directory's name as a pattern ("lr=[1e-4,2e-4]" finds nothing), and after a full
    disk or a damaged file its event loop leaves tracebacks on stderr that no caller can catch.

    Args:
        directory: made if it does not exist.
        keep: number of newest checkpoints kept.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.name.startswith("."):  # a killed process was writing it
                path.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # With an error on its way, one of the background must not take its place.
            if error is None:
                self.wait()
        finally:
            self._writer.shutdown()

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    @property
    def last(self) -> str:
        """The last complete checkpoint, in words."""
        steps = self.steps
        return f"the checkpoint of step {steps[-1]} in {self._directory}" if steps else "no checkpoint yet"

    def save(self, state: TrainState, *, data: dict[str, Any]) -> None:
        """Writes a checkpoint in the background, once the one before is complete.

        Args:
            state: copied before this returns, so that the next step may consume it.
            data: the position in the data, as the iterator's ``get_state`` gives it.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        tensors = {name: np.array(leaf, order="C") for name, leaf in _named(state).items()}
        self.wait()
        self._under_way = self._writer.submit(self._write, int(state.step), tensors, json.dumps(data))

    def wait(self) -> None:
        """Returns when the checkpoint under way is complete; a CheckpointError if it could not be written."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            under_way.result()
        except (OSError, MemoryError) as error:
            raise CheckpointError(
                "A checkpoint must be written completely",
                error,
                f"Free some space, then go on with resume (--resume) from {self.last}.",
            ) from error

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
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                damage[step] = _first_line(error)
                continue
            self._set_aside(damage, used=step)
            return state, data
        if not damage:
            return None
        raise CheckpointError(
            f"One of the checkpoints in {self._directory} must be readable and of this run",
            "; ".join(f"step {step}: {what}" for step, what in damage.items()),
            "Start again with overwrite (--overwrite), or put an intact copy in its place.",
        )

    def _path(self, step: int) -> Path:
        return self._directory / f"{step}.safetensors"

    def _write(self, step: int, tensors: Mapping[str, np.ndarray], data: str) -> None:
        metadata = {"data": data, "digest": _digest(tensors, data)}
        write_whole(self._path(step), dump_safetensors(dict(tensors), metadata))
        for old in self.steps[: -self._keep]:
            self._path(old).unlink()

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        raw = self._path(step).read_bytes()
        tensors = load_safetensors(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        data = header["__metadata__"]["data"]
        if _digest(tensors, data) != header["__metadata__"]["digest"]:
            raise ValueError("its content does not match its digest")
        wanted = _named(like)
        there, here = ({f"{n} {x.dtype}{x.shape}" for n, x in tree.items()} for tree in (tensors, wanted))
        if there != here:
            raise ValueError(f"it holds {short(sorted(there - here))}, the run {short(sorted(here - there))}")
        leaves = [jax.device_put(tensors[name], replicated()) for name in wanted]
        state: TrainState = jax.tree.unflatten(jax.tree.structure(like), leaves)
        if state.seed != like.seed:
            raise ValueError(f"its seed is {state.seed}, the run's is {like.seed}")
        return state, json.loads(data)

    def _set_aside(self, damage: Mapping[int, str], *, used: int) -> None:
        """Moves damaged checkpoints away, for their steps will be written again."""
        for step, what in damage.items():
            target = self._directory.parent / DAMAGED / self._path(step).name
            while target.exists():
                target = target.with_name(f"again_{target.name}")
            target.parent.mkdir(exist_ok=True)
            self._path(step).rename(target)
            warnings.warn(
                f"the checkpoint of step {step} is damaged ({what}); going on from step {used}. "
                f"It was moved to {target}",
                stacklevel=3,
            )


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by their places, in the order of the tree."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _digest(tensors: Mapping[str, np.ndarray], data: str) -> str:
    """A fingerprint of the position in the data, and of every tensor's name, shape, dtype and bytes."""
    sha = hashlib.sha256(data.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        sha.update(tensor.tobytes())
    return sha.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
