"""The trainer: a model, data and settings become a run in a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.loading import mixed_batches, rows_of_epoch
from hylorada_jax.data.mixture import Mixture
from hylorada_jax.data.packing import Rows
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.evaluation.perplexity import PerplexityEvaluator
from hylorada_jax.io.files import write_json
from hylorada_jax.math.quantized import dtype_name
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.batch import Batch, computed
from hylorada_jax.models.families import either
from hylorada_jax.placement.placement import placement_of
from hylorada_jax.placement.processes import agree, everywhere, is_first, on_first, whole
from hylorada_jax.placement.shards import in_use, own_rows, shard_rows
from hylorada_jax.saved.adapter_files import check_beside
from hylorada_jax.terminal import one_line
from hylorada_jax.training.checkpoint import Checkpoints
from hylorada_jax.training.checks import check_data, check_groups, check_training
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.identity import circumstances, defaults, run_identity
from hylorada_jax.training.loop import Loop
from hylorada_jax.training.memory import Choice, Setting, beside_step, candidates, choose, device_memory
from hylorada_jax.training.optimizer import make_optimizer, reported_rate
from hylorada_jax.training.report import MetricsLog, Record, plot_losses
from hylorada_jax.training.run_directory import RunDirectory
from hylorada_jax.training.run_record import RunRecord, read_record
from hylorada_jax.training.step import init_state, make_train_step
from hylorada_jax.training.wandb_run import WandbRun

_SHOWN_WITHIN = 60.0  # seconds: Linux asks an NFS server again after so long what is in a directory


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        steps: optimizer steps done.
        kept: the step whose adapter was kept: the last, or the best with ``keep="best"``.
        losses: training loss at each logged step, in nats per token.
        perplexity_before: on the held-out data before the first step; None without such data, or where a
            resumed run's metrics.jsonl no longer says it.
        perplexity_after: with the adapter that was kept; None likewise.
        adapter: directory of the saved adapter.
        metrics: metrics.jsonl.
        loss_plot: loss.png.
    """

    steps: int
    kept: int
    losses: list[float]
    perplexity_before: float | None
    perplexity_after: float | None
    adapter: Path
    metrics: Path
    loss_plot: Path


class HyLoRADATrainer:
    """Trains a model's adapters and keeps the run in a directory.

    The directory gets adapter/ (the result), checkpoints/, metrics.jsonl, tensorboard/ where that is
    installed, loss.png, run.json (what the run is) and recipe.json. A run that was killed at any moment goes
    on with ``resume=True`` and ends with the same bits. All settings are checked here, before any work. With
    several processes each makes the same trainer, and the first writes all but the others' checkpoints.

    Args:
        model: what is trained, from the adapters that it has now; at the end it has the trained ones.
        train_data: a :class:`TokenizedDocument` per document (:func:`load_documents`, then :func:`tokenize`),
            or a sequence of token ids; or a :class:`Mixture` of such data from several sources.
        eval_data: the same of the held-out documents, or None.
        config: the settings.
        recipe: what repeats the run, as plain JSON types, to be kept in recipe.json; None for none. Its
            "remat" and "microbatches" are kept as they were chosen.
        memory: bytes that a step may take on each device; None asks the devices.

    Attributes:
        choice: remat and microbatches, as given or chosen; its text says why.

    Raises:
        ConfigError: the model's adapters are disabled, packing is asked for and the model knows no segments,
            the mesh does not fit the devices, the rows or the heads, or is not the one that the model lies
            on, nothing in the model reads structure, wandb is asked for and not installed, the model knows no
            rematerialisation, or the step does not fit the memory.
        DataError: there is too little data, none is held out where the settings need it, a token id is
            outside the vocabulary, a row is longer than the model's table of positions, or a field of a
            document does not fit its tokens.
        ModelError: the model has no output head that the built-in loss can read.
        CheckpointError: the output directory cannot be written, holds a run and neither resume nor overwrite
            is set, holds something else of a name that a run writes, or another trainer is in it, or the
            model's chat template cannot be saved.

    Example:
        >>> config = TrainingConfig(output="runs/a", steps=200)
        >>> result = HyLoRADATrainer(model, train, held_out, config).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: HyLoRADAModel,
        train_data: Sequence[Any] | Mixture,
        eval_data: Sequence[Any] | Mixture | None,
        config: TrainingConfig,
        *,
        recipe: Mapping[str, Any] | None = None,
        memory: int | None = None,
    ) -> None:
        if model.disabled:
            raise ConfigError(
                "A trainer must be made outside of disable_adapter().",
                "a model whose adapters are disabled",
                "Make it before or after that block: its evaluations would be of the base alone.",
            )
        self._model = model
        self._directory = RunDirectory(config.output)
        self._directory.refuse_unless(resume=config.resume, overwrite=config.overwrite)
        placement = check_training(model.base, config)
        self._placement = model.placement or placement
        check_groups(model.config, config.seq_len)
        check_beside(model.chat_template, model.structure)
        mixture, held_out = check_data(train_data, eval_data, model.vocab_size, model.config, config)
        self._rows = [
            (Rows(documents, config.seq_len, packing=config.packing), weight)
            for documents, weight in mixture.sources
        ]
        config = config.for_rows(rows_of_epoch(self._rows))
        self._peak = reported_rate(model.adapters, config, model.config)
        if config.learning_rate not in (None, self._peak):
            warnings.warn(
                f"learning_rate={config.learning_rate:g} is not read: what {model.config.method} trains "
                f"has rates of its own, at most {self._peak:g}",
                stacklevel=2,
            )
        if (rising := config.rising_steps) >= config.steps:
            warnings.warn(
                f"the warm-up of {rising} steps is no shorter than the run of {config.steps}: the rates come "
                f"to {(config.steps - 1) / rising:.0%} of their peak",
                stacklevel=2,
            )
        config = dataclasses.replace(
            config, learning_rate=config.rate_for(model.config), progress=config.progress and is_first()
        )
        self.choice = self._chosen(config, memory or device_memory())
        setting = self.choice.setting._asdict()
        self._config = config = dataclasses.replace(config, **setting)
        self._recipe = recipe and {name: setting.get(name, value) for name, value in recipe.items()}
        self._evaluator = None if held_out is None else _evaluator(model, held_out, config)
        self._start = model.adapters  # as the identity has them, also where train() is called again
        self._identity = run_identity(model, config, train_data=mixture, eval_data=held_out)
        theirs = {name: value for name, value in vars(config).items() if name not in ("output", "progress")}
        agree(self._identity | {"settings": theirs})

    def _chosen(self, config: TrainingConfig, limit: int | None) -> Choice:
        """Remat and microbatches, with the step."""
        model, placement = self._model, self._placement
        optimizer = make_optimizer(model.adapters, config, model.config)
        frozen = model.frozen if model.placement else placement.shapes(model.frozen)

        def step_of(setting: Setting) -> jax.stages.Wrapped:
            training = dataclasses.replace(config, **setting._asdict())
            return make_train_step(model.with_remat(setting.remat), optimizer, training, placement.rules)

        def arguments() -> tuple[Any, Any, Any]:
            state = jax.eval_shape(lambda adapters: init_state(adapters, optimizer), model.adapters)
            batch = next(self._batches(config))
            return placement.shapes(state), frozen, shard_rows(computed(batch))

        own = getattr(model.base.module, "remat", None)
        settings = candidates(config, own=own, devices=placement.rows)
        settings = _as_begun(config, self._directory, placement.rows) + settings
        with in_use(frozen):
            return choose(
                settings,
                step_of,
                arguments,
                limit,
                beside=beside_step(model, placement),
                remedy=_smaller(config, model.base),
            )

    def _batches(self, config: TrainingConfig) -> grain.DatasetIterator[Batch]:
        own = own_rows(self._placement.mesh, config.batch_size)
        return mixed_batches(self._rows, config.batch_size, config.seed, own)

    def train(self) -> TrainingResult:
        """Runs to the end, from the start or from the newest usable checkpoint.

        Returns:
            Perplexities, losses and the places of the files.

        Raises:
            NonFiniteError: a loss or a gradient became NaN or infinite; the error names the step, the file
                with the batch, and the last good checkpoint.
            CheckpointError: a checkpoint or another file could not be written, or none can be used; or
                another trainer is in the directory.
            BrokenPipeError: nobody reads what is printed any more.
            KeyboardInterrupt: after an interrupt, once a checkpoint is written, or in the last step the
                adapter. A second one does not wait.
        """
        config, directory = self._config, self._directory
        try:
            with contextlib.ExitStack() as until_the_end:
                run = on_first(functools.partial(self._opened, until_the_end))
                if not all(seen := everywhere(_appears(directory.run))):
                    raise CheckpointError(
                        "The output directory must be one that all processes see.",
                        f"{directory.path}, which process {seen.index(False)} does not see",
                        "Choose a directory on a file system that their machines share.",
                    )
                checkpoints = Checkpoints(directory.checkpoints, config.keep_checkpoints)
                return self._train(until_the_end.enter_context(checkpoints), run)
        except BrokenPipeError:  # of a line that is printed
            raise
        except OSError as error:  # a full disk also meets the small files
            raise CheckpointError(
                "The output directory must be writable.",
                f"{directory.path}: {error}",
                "See to what the message says, as by freeing space, then go on with resume (--resume).",
            ) from error

    def _opened(self, until_the_end: contextlib.ExitStack) -> RunRecord:
        """The directory, made ready, and no other trainer's until the end; in the first process."""
        config, directory = self._config, self._directory
        until_the_end.enter_context(directory.alone())
        run = directory.open(
            self._identity,
            circumstances(self._model, config) | {"mesh": config.mesh or None},
            defaults=defaults(self._model.config),
            resume=config.resume,
            overwrite=config.overwrite,
        )
        if self._recipe is not None:
            write_json(directory.recipe, self._recipe)
        return run

    def _train(self, checkpoints: Checkpoints, run: RunRecord) -> TrainingResult:
        config, directory, model = self._config, self._directory, self._model
        optimizer = make_optimizer(model.adapters, config, model.config)
        placement = self._placement
        state = placement.put(init_state(self._start, optimizer, config.seed, model.placement))
        batches = self._batches(config)
        if found := checkpoints.restore(state):
            state, position = found
            batches.set_state(position)
        elif config.resume and directory.metrics.exists():
            print(f"{one_line(directory.path)} has no checkpoint yet: starting from the first step")
        start = int(state.step)
        with MetricsLog(directory.metrics, directory.tensorboard, last_step=start) as log:
            if start and config.needs_evaluations:
                _require_evaluations(log, checkpoints, config)
            if config.report_to == "wandb" and is_first():
                settings = {**run.identity, "ran_on": run.recorded, "recipe": self._recipe}
                log.send_to(WandbRun(directory.path, run.id, settings))
            frozen = model.frozen if model.placement else placement.put(model.frozen)
            loop = Loop(config, self._peak, directory, checkpoints, log, frozen, self._evaluator)
            state = loop.run(self.choice.step, state, batches)
            checkpoints.wait()
            steps = kept = int(state.step)
            if config.keep == "best" and (kept := log.bests[-1]["step"]) != steps:
                state = checkpoints.state_of(kept, state)
            model.adapters = state.adapters
            if model.placement is None:  # its frozen weights are on one device
                model.adapters = jax.device_put(jax.tree.map(whole, state.adapters))
            model.save_pretrained(directory.adapter, overwrite=True, weights=True)
            if is_first():
                plot_losses(log.records, directory.loss_plot)
            if loop.interrupted:  # too late to stop it; a sweep does not go on
                raise KeyboardInterrupt(
                    f"interrupted: the run has ended, its adapter is in {one_line(directory.adapter)}"
                )
            return TrainingResult(
                steps=steps,
                kept=kept,
                losses=[record["loss"] for record in log.records if "loss" in record],
                perplexity_before=_perplexity(log.evaluation_at(0)),
                perplexity_after=_perplexity(log.evaluation_at(kept)),
                adapter=directory.adapter,
                metrics=directory.metrics,
                loss_plot=directory.loss_plot,
            )


def _as_begun(config: TrainingConfig, directory: RunDirectory, devices: int) -> list[Setting]:
    """What a run that goes on chose when it began, unless so many devices cannot divide the rows by it."""
    given = {name: getattr(config, name) for name in Setting._fields}
    if not (config.resume and "auto" in given.values() and directory.run.exists()):
        return []
    begun = read_record(directory.run).recorded
    chosen: Any = {name: begun.get(name) if value == "auto" else value for name, value in given.items()}
    if None in chosen.values() or config.batch_size // chosen["microbatches"] % devices:
        return []
    return [Setting(**chosen)]


def _appears(file: Any) -> bool:
    """Whether a file that the first process has written is there: on NFS it may take a while to show."""
    until = time.monotonic() + _SHOWN_WITHIN
    while not (there := bool(file.exists())) and time.monotonic() < until:
        time.sleep(0.5)
    return there


def _smaller(config: TrainingConfig, base: BaseModel) -> str:
    """What would make a step smaller that does not fit."""
    ways = []
    if config.remat in ("none", "dots") and hasattr(base.module, "remat"):
        ways.append("remat='full' (--remat full)")
    if config.microbatches != "auto" and config.microbatches < config.batch_size:
        ways.append("microbatches='auto' (--microbatches auto)")
    if placement_of(base.params) is None and (count := jax.device_count()) > 1:
        ways.append(f"weights that are cut over the devices (--mesh fsdp={count})")
    if config.resume:  # what follows would be another run
        ways.append("devices with more memory")
    else:
        ways += ["shorter rows (seq_len)", "a smaller batch_size"]
        if base.dtype == jnp.float32:
            ways.append("bfloat16 (--dtype bfloat16)")
        if hasattr(base.module, "remat") and dtype_name(base.params) == base.dtype.name:
            ways.append("a base in 4 bits (--base-dtype nf4)")
    return f"Choose {either(ways)}."


def _evaluator(
    model: HyLoRADAModel, documents: Sequence[TokenizedDocument], config: TrainingConfig
) -> PerplexityEvaluator:
    return PerplexityEvaluator(
        model,
        documents,
        seq_len=config.seq_len,
        stride=config.eval_stride or config.seq_len,
        batch_size=config.batch_size // config.passes,
        max_tokens=config.eval_tokens,
    )


def _require_evaluations(log: MetricsLog, checkpoints: Checkpoints, config: TrainingConfig) -> None:
    """Refuses to go on by evaluations that are not known, or to keep a best that is not there."""
    if not log.evaluations:
        raise CheckpointError(
            "Keeping the best and patience go by the evaluations in metrics.jsonl.",
            "none up to the checkpoint",
            "Put an intact copy of the file in its place, or resume without keep and patience.",
        )
    best = log.bests[-1]["step"]
    if config.keep == "best" and best not in checkpoints.steps:
        raise CheckpointError(
            "The best of a run can be kept while its checkpoint is there.",
            f"the best evaluation so far, of step {best}, and {checkpoints.last}",
            "Resume with keep='last' (--keep last), or start again with overwrite (--overwrite).",
        )


def _perplexity(record: Record | None) -> float | None:
    return None if record is None else record["eval_perplexity"]
