"""What a run tells: metrics.jsonl, those that its lines are sent to, as TensorBoard, and loss.png."""

from __future__ import annotations

import io
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Protocol

import msgspec

from hylorada_jax.errors import CheckpointError
from hylorada_jax.evaluation.perplexity import perplexity
from hylorada_jax.io import bucket
from hylorada_jax.io.files import make_directory, write_figure, write_whole
from hylorada_jax.io.reading import checked
from hylorada_jax.placement.processes import is_first, on_first
from hylorada_jax.text import parse_json, to_json

Record = Mapping[str, Any]

# Between writes of a file in a bucket: a kill costs lines of so long, though none up to a checkpoint.
_SECONDS = 30.0
_MAX_LINE = 2**16  # bytes; far more than a line has
_Step = Annotated[int, msgspec.Meta(ge=0)]
_Loss = Annotated[float, msgspec.Meta(ge=-4e38, le=4e38)]  # finite in float32, and drawn without an overflow


class _Training(msgspec.Struct):
    """What is read of a training step's line; the rest is kept as it is."""

    step: _Step
    loss: _Loss


class _Evaluation(msgspec.Struct):
    """What is read of an evaluation's."""

    step: _Step
    eval_loss: _Loss
    eval_perplexity: float
    loss: _Loss = 0.0  # read where there is one


class Speed:
    """Tokens per second over the last steps.

    A step is reported while the next one already runs, so that the time between two reports says little;
    over several it evens out.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=16)  # (when, tokens done by then)
        self.restart()

    def restart(self) -> None:
        """Forgets what was: call it after a pause that was no training."""
        self._marks.clear()
        self._marks.append((time.perf_counter(), 0))

    def add(self, tokens: int) -> float:
        """Notes that a step of so many tokens is done, and returns tokens per second."""
        self._marks.append((time.perf_counter(), self._marks[-1][1] + tokens))
        (start, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(now - start, 1e-9)


class Board(Protocol):
    """Whom the lines of metrics.jsonl are sent to."""

    def add(self, record: Record) -> None:
        """Takes a line."""

    def close(self, *, failed: bool) -> None:
        """Takes no more of them: the run has ended, or failed."""


class MetricsLog:
    """The lines of metrics.jsonl, also sent to TensorBoard where that is installed.

    A line is an object with ``step`` and either the metrics of a training step with ``tokens_per_second``
    (the first of a process has the compiler's time in it), or ``eval_loss``, ``eval_perplexity`` and
    ``eval_tokens``; null stands for a number that is infinite. Use as a context manager. Of several processes
    each has the lines, and the first writes and sends them.

    Args:
        path: metrics.jsonl; what it holds is kept up to ``last_step``.
        tensorboard: directory of TensorBoard's event files.
        last_step: the step that the run goes on from: later lines will be written again.

    Attributes:
        records: the lines.
        evaluations: those of evaluations.
    """

    def __init__(self, path: Path, tensorboard: Path, *, last_step: int) -> None:
        self.records: list[Record] = on_first(
            lambda: [r for r in read_metrics(path) if r["step"] <= last_step]
        )
        self.evaluations = [r for r in self.records if "eval_loss" in r]
        self._file: _Appending | _Rewriting | None = None
        self._boards: list[Board] = []
        if not is_first():
            return
        lines = [to_json(record) + "\n" for record in self.records]
        write_whole(path, "".join(lines).encode())
        self._file = _opened(path, os.O_APPEND)
        if (board := _TensorBoard.open(tensorboard)) is not None:
            self._boards.append(board)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        for board in self._boards:
            board.close(failed=error is not None)

    def send_to(self, board: Board) -> None:
        """Sends the lines that there are, and those to come."""
        for record in self.records:
            board.add(record)
        self._boards.append(board)

    def write(self, record: Record) -> None:
        """Appends one line, at once; in a bucket by :meth:`flush`, if not before."""
        self.records.append(record)
        if "eval_loss" in record:
            self.evaluations.append(record)
        if self._file is not None:
            self._file.write((to_json(record) + "\n").encode())
        for board in self._boards:
            board.add(record)

    def flush(self) -> None:
        """Writes what is still to be written: call it before a checkpoint, from which the lines go on."""
        if self._file is not None:
            self._file.flush()

    def evaluation_at(self, step: int) -> Record | None:
        """The evaluation of a step, if there is one."""
        return next((r for r in self.evaluations if r["step"] == step), None)

    @property
    def bests(self) -> list[Record]:
        """The evaluations of less held-out loss than any before them; the last of them is the best."""
        bests: list[Record] = []
        for record in self.evaluations:
            if not bests or record["eval_loss"] < bests[-1]["eval_loss"]:
                bests.append(record)
        return bests


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl; none if it does not exist. A last line cut by a kill is left out.

    Raises:
        CheckpointError: a line is damaged, or is not of the metrics.
    """
    if not path.exists():
        return []
    rule = "Every line of metrics.jsonl must be JSON, a step and its numbers."
    remedy = "Remove the damaged line."
    if not path.is_file():  # a pipe never ends
        raise CheckpointError(rule, f"{path} is not a file", "Move it away.")
    records: list[Record] = []
    with bucket.answering(path), path.open("rb") as opened, io.BufferedReader(opened) as file:
        # Line by line, and no line longer than any that is written: the file may be of any size.
        while (line := file.readline(_MAX_LINE)).endswith(b"\n"):
            place = f"{path}:{len(records) + 1}"
            try:
                record = parse_json(line.decode())
            except ValueError as error:
                raise CheckpointError(rule, f"{place}: {error}", remedy) from error
            if isinstance(record, dict):  # null is what JSON can say of infinity
                record = {name: math.inf if item is None else item for name, item in record.items()}
            kind = _Evaluation if isinstance(record, dict) and "eval_loss" in record else _Training
            checked(record, kind, rule, CheckpointError, remedy, place)
            records.append(record)
    if len(line) == _MAX_LINE:
        raise CheckpointError(rule, f"{path}: a line of {_MAX_LINE:,} bytes and more", remedy)
    return records


def plot_losses(records: Sequence[Record], path: Path) -> None:
    """Draws the training loss per step, its running mean, and the held-out loss.

    Args:
        records: the lines of metrics.jsonl.
        path: the PNG to write.
    """
    # Figure instead of pyplot: no window system and no global state. Imported late: it takes a second.
    from matplotlib.figure import Figure

    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(steps, _running_mean(losses), color="tab:blue", linewidth=2, label="training, running mean")
    if held_out:
        first, last = (perplexity(loss) for _, loss in (held_out[0], held_out[-1]))
        label = f"held out, perplexity {first:.2f} to {last:.2f}"
        axes.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", linewidth=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def _running_mean(values: Sequence[float]) -> list[float]:
    """An exponential running mean over about a twentieth of the run, without the bias of its beginning."""
    decay = 1 - 1 / max(1, len(values) / 20)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return means


class _Appending:
    """A file that is written at once: what a full disk refused is not tried again when the file is closed.

    Args:
        path: no link is followed.
        flags: O_APPEND for a file that is there, O_EXCL for a new one.
    """

    def __init__(self, path: Path, flags: int) -> None:
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | flags, 0o666)
        self._file = open(opened, "wb", buffering=0)  # noqa: SIM115 - closed by close

    def write(self, content: bytes) -> None:
        """Appends all of it; an OSError where the disk does not take it."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Waits until the disk has it all: a checkpoint that outlives the machine relies on the lines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Rewriting:
    """A file in a bucket, which takes no appends: it is written anew, whole.

    Args:
        path: what the file holds is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with bucket.answering(path):
            self._content = bytearray(path.read_bytes() if path.exists() else b"")
        self._written = (len(self._content), time.monotonic())

    def write(self, content: bytes) -> None:
        """Appends all of it, and writes the file if the last time was a while ago; an OSError from there."""
        self._content += content
        if time.monotonic() - self._written[1] > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the file, if there is more of it than was written."""
        if len(self._content) > self._written[0]:
            write_whole(self._path, bytes(self._content))
            self._written = (len(self._content), time.monotonic())

    def close(self) -> None:
        """Writes the rest."""
        self.flush()


def _opened(path: Path, flags: int) -> _Appending | _Rewriting:
    """A file to append to: in a bucket, or else as :class:`_Appending` takes it."""
    return _Rewriting(path) if bucket.is_in_bucket(path) else _Appending(path, flags)


class _TensorBoard:
    """An event file of TensorBoard's.

    Not by its EventFileWriter: that writes in a thread, where a full disk leaves a traceback, and then a run
    that waits for ever for the thread's queue.
    """

    def __init__(self, path: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._records = RecordWriter(_opened(path, os.O_EXCL))
        self._write(file_version="brain.Event:2")

    @classmethod
    def open(cls, directory: Path) -> _TensorBoard | None:
        """A new event file; None where TensorBoard is not installed."""
        try:
            import tensorboard.summary.writer.record_writer  # noqa: F401
        except ImportError:
            return None
        make_directory(directory)
        # TensorBoard reads the files in the order of their names.
        return cls(directory / f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}")

    def add(self, record: Record) -> None:
        """Writes the values of a line of metrics.jsonl."""
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in record.items() if tag != "step"]
        self._write(step=record["step"], summary=self._summary(value=values))

    def _write(self, **what: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **what).SerializeToString())

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        self._records.close()
