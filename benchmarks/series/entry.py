"""A base model that knows other series, and a method that adapts it to one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.series.baselines import error_of
from benchmarks.series.data import other_series, target_series
from benchmarks.series.setup import LONG, Budget, Method, Setting, adapter
from benchmarks.series.tokens import Prepared, boundaries, pretraining_rows, windows
from benchmarks.trainables import Adapted, Full
from benchmarks.trial import Runner
from hylorada_jax.evaluation.sweep import Sweep
from hylorada_jax.math.loss import logits
from hylorada_jax.models.causal_lm import CausalLM

Record = dict[str, Any]

_EVALUATED_AT_ONCE = 64  # rows


def bases_of(budget: Budget, target: str) -> list[CausalLM]:
    """For each seed a small Llama that knows other series, up to where those of the target are held out."""
    series = target_series()
    dev_at, _ = boundaries(series.pop(target))
    rows = pretraining_rows([*series.values(), *other_series()], budget.bins, LONG, dev_at)
    runner, bases = Runner(rows), []
    for seed in budget.seeds:
        full = Full(CausalLM.from_config(budget.decoder(), jax.random.key(seed)))
        training = budget.training(rows, steps=budget.pretrain_steps, rate=budget.pretrain_rate, seed=seed)
        bases.append(full.trained(runner.train(full, training)[0]))
    return bases


class Program(NamedTuple):
    """What is compiled for a method and a context, whatever the series, base, seed and rate.

    Attributes:
        runner: trains; its rows are exchanged.
        sweep: the losses of the last targets of rows, and the means of the tokens predicted there.
    """

    runner: Runner
    sweep: Sweep


def last(hidden: Array, head: Array, soft_cap: float | None, batch: Mapping[str, Array]) -> Array:
    """[2, rows]: the losses of each row's last target, and the means of the tokens predicted there."""
    log_p = jax.nn.log_softmax(logits(hidden[:, -1], head, soft_cap))
    target = jnp.maximum(batch["targets"][:, -1:], 0)  # rows of padding have none
    mean = jnp.exp(log_p) @ jnp.arange(log_p.shape[-1], dtype=jnp.float32)
    return jnp.stack([-jnp.take_along_axis(log_p, target, -1)[:, 0], mean])


class Entry:
    """A method in a setting.

    Args:
        budget: how much is computed.
        setting: what is predicted from what.
        prepared: its tokens.
        method: what adapts; None measures the bases as they are.
        bases: one for each seed.
        programs: what was compiled before, and is added to.
    """

    def __init__(
        self,
        budget: Budget,
        setting: Setting,
        prepared: Prepared,
        method: Method | None,
        bases: list[CausalLM],
        programs: dict[Any, Program],
    ) -> None:
        self._budget, self._prepared = budget, prepared
        hours = None if method is None else method.hours
        self._rows = {part: windows(prepared, part, setting.context, hours) for part in prepared.parts}
        config = None if method is None else adapter(method, budget.rank, setting.context)
        self._entrants = [None if config is None else Adapted(base, config) for base in bases]
        self._bases = bases
        key = (config, setting.context, hours is None)
        if key not in programs:
            model = bases[0] if config is None else self._entrants[0].model  # type: ignore[union-attr]
            programs[key] = Program(Runner(self._rows["adapt"]), Sweep(model, last))
        self._program = programs[key]
        self._program.runner.rows = self._rows["adapt"]

    def runs(self) -> list[Record]:
        """Each rate with the first seed, the best of them with the others."""
        seeds = range(len(self._budget.seeds))
        if self._entrants[0] is None:
            return [self._run(at, 0.0) for at in seeds]
        tried = [self._run(0, rate) for rate in self._budget.learning_rates]
        best = min(tried, key=lambda run: run["dev_loss"])["rate"]
        return tried + [self._run(at, best) for at in seeds[1:]]

    def _run(self, at: int, rate: float) -> Record:
        """What one run trained, and its measures."""
        entrant, seed = self._entrants[at], self._budget.seeds[at]
        trained: Record = {"parameters": 0}
        model: Record = {"adapters": {}, "frozen": {"params": self._bases[at].params}}
        if entrant is not None:
            steps = self._budget.steps
            training = self._budget.training(self._rows["adapt"], steps=steps, rate=rate, seed=seed)
            adapters, found = self._program.runner.train(entrant, training)
            trained = {name: found[name] for name in ("parameters", "losses")}
            model = {"adapters": adapters, "frozen": entrant.model.frozen}
        dev_loss, _ = self._measure("dev", model)
        loss, error = self._measure("test", model)
        return {
            "rate": rate,
            "seed": seed,
            **trained,
            "dev_loss": dev_loss,
            "loss": loss,
            "perplexity": math.exp(loss),
            "mae": error,
        }

    def _measure(self, part: str, model: Record) -> tuple[float, float]:
        """Mean loss in nats and mean absolute error in the series' unit, each value from a whole context."""
        rows, prepared = self._rows[part], self._prepared
        found = [values for _, values in self._program.sweep(rows, _EVALUATED_AT_ONCE, **model)]
        losses, tokens = np.concatenate(found, axis=1)[:, : len(rows)].astype(np.float64)
        start, stop = prepared.parts[part]  # there is a row for each value of it
        predicted = np.copy(prepared.offset)
        predicted[start:stop] += prepared.quantiser.values(tokens)
        return float(losses.mean()), error_of(prepared, predicted, part)
