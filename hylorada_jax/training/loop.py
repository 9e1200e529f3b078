"""The loop over steps, and what happens between them: looking, evaluating, saving, stopping."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from hylorada_jax.errors import NonFiniteError
from hylorada_jax.evaluation.perplexity import PerplexityEvaluator
from hylorada_jax.io.files import write_whole
from hylorada_jax.models.batch import Batch, computed
from hylorada_jax.placement.processes import are_several, is_first
from hylorada_jax.placement.shards import in_use, shard_rows
from hylorada_jax.terminal import bar_options, one_line
from hylorada_jax.training.checkpoint import Checkpoints
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import schedule
from hylorada_jax.training.report import MetricsLog, Speed
from hylorada_jax.training.run_directory import RunDirectory
from hylorada_jax.training.step import Metrics, TrainState
from hylorada_jax.trees import Frozen


class _Pending(NamedTuple):
    """A step that was started, and whose metrics are still to be read."""

    step: int
    batch: Batch
    metrics: Metrics


@dataclasses.dataclass
class Loop:
    """What the loop over steps needs, and the loop.

    Attributes:
        config: the settings.
        peak: the learning rate that the metrics name.
        directory: where the run is kept.
        checkpoints: where its states are saved.
        log: where its metrics go.
        frozen: the model's frozen tree, on the devices.
        evaluator: of the held-out data, or None.
        interrupted: after the run, whether there was a Ctrl-C or SIGTERM in its last step.
    """

    config: TrainingConfig
    peak: float
    directory: RunDirectory
    checkpoints: Checkpoints
    log: MetricsLog
    frozen: Frozen
    evaluator: PerplexityEvaluator | None
    interrupted: bool = False
    _speed: Speed = dataclasses.field(default_factory=Speed)
    _compiled: bool = False

    def __post_init__(self) -> None:
        # At once: asked of the device after a step, one would wait for the step that was begun meanwhile.
        self._factors = np.asarray(jax.vmap(schedule(self.config))(jnp.arange(self.config.steps)))

    def run(
        self,
        train_step: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]],
        state: TrainState,
        batches: grain.DatasetIterator[Batch],
    ) -> TrainState:
        """Trains to the last step, or until the patience is at its end.

        A step's metrics are read only after the next step was started, so that the device never waits for
        the host; before anything is saved or evaluated they are read at once, so that a state that is not
        finite never reaches a checkpoint.

        Args:
            train_step: from :func:`make_train_step`.
            state: where to go on from; consumed.
            batches: positioned after the batch of ``state.step``.

        Returns:
            The state after the last step that was done, saved.
        """
        config, step = self.config, int(state.step)
        if step == 0:
            if not self.log.evaluations:
                self._evaluate(state)
            if config.keep == "best" and not self.checkpoints.steps:
                self._save(state, batches)
        ended = step == config.steps or self._out_of_patience()
        pending: _Pending | None = None
        shown = bar_options(shown=config.progress)
        bar = tqdm(total=config.steps, initial=step, desc="training", unit="step", **shown)
        with bar, _interrupts() as interrupted:
            self._speed.restart()
            # jax stops all at the number after the largest that it was asked about, and at no later one: at 1
            # where the notice came before this.
            early = multihost_utils.reached_preemption_sync_point(1)
            multihost_utils.reached_preemption_sync_point(step)
            while not ended:
                step += 1
                batch = next(batches)
                with in_use(self.frozen):
                    state, metrics = train_step(state, self.frozen, shard_rows(computed(batch)))
                self._look_at(pending, bar)
                pending = _Pending(step, batch, metrics)
                ended, best = step == config.steps, False
                if ended or (config.eval_every is not None and step % config.eval_every == 0):
                    self._look_at(pending, bar)
                    pending = None
                    self._evaluate(state)
                    ended = ended or self._out_of_patience()
                    best = config.keep == "best" and self.log.bests[-1]["step"] == step
                # The other processes have to stop too, and after the same step: jax finds it.
                agreed = multihost_utils.reached_preemption_sync_point(step)
                stops = (agreed or early or (interrupted.is_set() and not are_several())) and not ended
                if ended or best or stops or step % config.checkpoint_every == 0:
                    self._look_at(pending, bar)
                    pending = None
                    self._save(state, batches)
                if pending is None:  # there was a pause that was no training
                    self._speed.restart()
                if stops:
                    self._stop(step)
            self.interrupted = interrupted.is_set()
        if step < config.steps:
            least = self.log.bests[-1]
            tqdm.write(
                f"stopped after step {step}: the held-out perplexity was least at step {least['step']}, "
                f"{least['eval_perplexity']:.3f}, and the patience is {config.patience}"
            )
        return state

    def _out_of_patience(self) -> bool:
        """Whether as many evaluations as ``patience`` says have been made since the best."""
        if self.config.patience is None:
            return False
        best = self.log.bests[-1]["step"]
        return sum(r["step"] > best for r in self.log.evaluations) >= self.config.patience

    def _save(self, state: TrainState, batches: grain.DatasetIterator[Batch]) -> None:
        self.log.flush()
        bests = [r["step"] for r in self.log.bests] if self.config.keep == "best" else []
        self.checkpoints.save(state, data=batches.get_state(), bests=bests)

    def _evaluate(self, state: TrainState) -> None:
        """Logs the held-out perplexity, if there is held-out data."""
        if self.evaluator is None:
            return
        step = int(state.step)
        try:
            found = self.evaluator(state.adapters, self.frozen, progress=self.config.progress)
        except NonFiniteError as error:
            raise self._not_finite(f"{error.received}, in the evaluation after step {step}") from error
        result = {"eval_loss": found.loss, "eval_perplexity": found.perplexity, "eval_tokens": found.tokens}
        self.log.write({"step": step, **result})
        if self.config.progress:
            tqdm.write(f"step {step}: held-out perplexity {found.perplexity:.3f} on {found.tokens:,} tokens")

    def _look_at(self, done: _Pending | None, bar: tqdm) -> None:
        """Waits for a step, checks and reports it; nothing where there is none."""
        if done is None:
            return
        values = {name: value.item() for name, value in jax.device_get(done.metrics).items()}
        values["learning_rate"] = self.peak * float(self._factors[done.step - 1])
        checked = {name: values[name] for name in ("loss", "grad_norm", "adapter_norm")}
        if not np.isfinite(list(checked.values())).all():
            found = ", ".join(f"{name} {value}" for name, value in checked.items())
            raise self._not_finite(
                f"{found} at step {done.step}, on rows {done.batch['row'].tolist()} of the training data, "
                f"{self._save_batch(done.batch)}"
            )
        # All that were computed with: in a conversation few are scored. Of the rows of other processes, as
        # many as in those of this one.
        computed_here = (done.batch["segment_ids"] > 0).mean()
        speed = self._speed.add(round(computed_here * done.batch["row"].size * self.config.seq_len))
        if done.step % self.config.log_every == 0 or done.step == self.config.steps:
            self.log.write({"step": done.step, **values, "tokens_per_second": round(speed, 1)})
        if not self._compiled:  # most of the first one's time was the compiler's
            self._compiled = True
            self._speed.restart()
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:,.0f} tokens/s")

    def _save_batch(self, batch: Batch) -> str:
        """Saves a batch to look at, and says where; a full disk must not hide that a loss was not finite."""
        if not is_first():
            return "of which the first process has saved its own"
        content = io.BytesIO()
        np.savez(content, **batch)  # type: ignore[arg-type]
        try:
            write_whole(self.directory.nonfinite_batch, content.getvalue())
        except OSError as error:
            return f"which could not be saved: {error}"
        return f"saved in {self.directory.nonfinite_batch}"

    def _not_finite(self, what: str) -> NonFiniteError:
        self.checkpoints.wait()
        return NonFiniteError(
            "Loss, gradient and adapters must be finite.",
            what,
            "Look at the batch, and start again with a smaller learning_rate, more warm-up or float32. Saved "
            f"before it: {self.checkpoints.last}.",
        )

    def _stop(self, step: int) -> None:
        self.checkpoints.wait()
        raise KeyboardInterrupt(
            f"interrupted: step {step} is saved in {one_line(self.directory.path)}; go on with resume "
            "(--resume)"
        )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second does what it ever did.

    An exception in the middle of a step would lose the state, which the step has consumed. SIGTERM is what
    precedes a preemption: of several processes jax itself notes it, and the one that Ctrl-C meets tells jax.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield interrupted
        return
    noted = [signal.SIGINT] if are_several() else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.getsignal(number) for number in noted}

    def note(number: int, _: object) -> None:
        interrupted.set()
        signal.signal(number, before[signal.Signals(number)])
        if are_several():
            os.kill(os.getpid(), signal.SIGTERM)

    for number in noted:
        signal.signal(number, note)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
