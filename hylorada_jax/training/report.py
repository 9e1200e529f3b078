"""What a run tells: metrics.jsonl, TensorBoard where it is installed, and loss.png."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hylorada_jax.io.files import write_whole

Record = Mapping[str, Any]


class Speed:
    """Tokens per second over the last steps.

    Steps are looked at while the next one already runs, so that the time between two looks says little;
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


class MetricsLog:
    """The lines of metrics.jsonl, also sent to TensorBoard where that is installed.

    A line is an object with ``step`` and either the metrics of a training step with ``tokens_per_second``, or
    ``eval_loss``, ``eval_perplexity`` and ``eval_tokens``. Use as a context manager.

    Args:
        path: metrics.jsonl; what it holds is kept up to ``last_step``.
        tensorboard: directory of TensorBoard's event files.
        last_step: the step that the run goes on from: later lines will be written again.
    """

    def __init__(self, path: Path, tensorboard: Path, *, last_step: int) -> None:
        self.records: list[Record] = [r for r in read_metrics(path) if r["step"] <= last_step]
        lines = [json.dumps(record) + "\n" for record in self.records]
        write_whole(path, "".join(lines).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board = _event_writer(tensorboard)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: Record) -> None:
        """Appends one line and flushes it."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.add_event(_event(record))

    def evaluation_at(self, step: int) -> Record | None:
        """The evaluation of a step, if there is one."""
        return next((r for r in self.records if r["step"] == step and "eval_loss" in r), None)


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl; none if it does not exist. A last line cut by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


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
        first, last = (math.exp(min(loss, 700)) for _, loss in (held_out[0], held_out[-1]))
        label = f"held out, perplexity {first:.2f} to {last:.2f}"
        axes.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", linewidth=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _running_mean(values: Sequence[float]) -> list[float]:
    """An exponential running mean over about a twentieth of the run, without the bias of its beginning."""
    decay = 1 - 1 / max(1, len(values) / 20)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return means


def _event_writer(directory: Path) -> Any:
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    return EventFileWriter(str(directory))


def _event(record: Record) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
    return Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
