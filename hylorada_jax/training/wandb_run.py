"""Weights & Biases: what metrics.jsonl gets is sent there, where a run asks for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hylorada_jax.errors import require_packages
from hylorada_jax.io.hub import is_offline
from hylorada_jax.terminal import one_line
from hylorada_jax.training.report import Record

_LAST_WAIT = 300.0
"""Seconds at the end for what is still to be sent: no network holds up a run that is done for longer."""


def require_wandb() -> None:
    """Raises a ConfigError where wandb is not installed."""
    require_packages(
        "Runs are sent to Weights & Biases by its package.", ["wandb"], 'pip install "hylorada[wandb]"'
    )


class WandbRun:
    """A run at Weights & Biases: one for a run of ours, however often it is resumed.

    No failure there costs the training anything: the first becomes a warning, and what follows is not sent.
    metrics.jsonl has it all, and whatever is missing when the run is resumed, finished or not, is sent then.

    Args:
        directory: of the run, which is named after it.
        run_id: what tells it from others; None for a new one.
        settings: to be shown as the run's config, of plain JSON types.
    """

    def __init__(self, directory: Path, run_id: str | None, settings: Mapping[str, Any]) -> None:
        self._run: Any = None
        try:
            import wandb

            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "hylorada"),
                name=os.environ.get("WANDB_NAME") or one_line(os.path.basename(os.path.abspath(directory))),
                id=run_id,
                resume="allow",
                config=dict(settings),
                allow_val_change=True,  # of a library's version, when the run is resumed
                mode="offline" if is_offline() else None,  # None leaves it to WANDB_MODE
                settings={"finish_timeout": _LAST_WAIT},
            )
            self._next = self._run.step  # what is before this was sent when the run was begun
        except Exception as error:  # of the network, the login, wandb's own process
            self._give_up(error)

    def add(self, record: Record) -> None:
        """Sends a line, if it is not there yet."""
        if self._run is None or record["step"] < self._next:
            return
        values = {name: value for name, value in record.items() if name != "step"}
        try:
            self._run.log(values, step=record["step"])
        except Exception as error:
            self._give_up(error)

    def close(self, *, failed: bool) -> None:
        """Waits until all is sent, but not for ever."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        warnings.warn(
            f"the run goes on without Weights & Biases ({type(error).__name__}: {error}); "
            "what is missing there is sent when it is resumed (--resume --report-to wandb)",
            stacklevel=4,
        )
