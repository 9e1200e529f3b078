"""The settings of one training run. Imports neither jax nor numpy, so a command line starts fast."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, get_args

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, require_one_of
from hylorada_jax.exact import fraction, plain_number
from hylorada_jax.placement.axes import mesh_sizes
from hylorada_jax.seeds import check_seed

Schedule = Literal["linear", "cosine", "constant"]
Keep = Literal["last", "best"]
RematPolicy = Literal["none", "dots", "full"]
Remat = Literal["auto", RematPolicy]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, batches, rates, evaluation, and the run's directory.

    Args:
        output: directory of the run, or of a bucket, as in gs://bucket/runs/a. A run in it is changed only
            with resume or overwrite, and files that no run wrote are never touched.
        steps: optimizer steps, ≥ 1.
        epochs: passes over the rows of the training data, in place of ``steps``.
        mesh: the devices as data × fsdp × tensor, such as fsdp=8,tensor=2: copies of the model, shards of its
            weights, shards of its heads. Devices that are left over go to data; by default all, or in the
            command to fsdp if a copy of the weights would take more than half of a device's memory.
        batch_size: rows per optimizer step, over all microbatches and devices.
        microbatches: parts a step's rows are computed in, one after the other; divides ``batch_size``.
            More parts take less memory and give the same result. "auto" uses more than one
            only if the step does not fit a device with remat="full".
        remat: what the backward pass recomputes to save memory: "none"; "dots", all but the outputs of
            attention and linear layers; "full", whole layers. "auto" uses the first of them that fits the
            device by the compiler's figures, and "none" on a CPU; a model loaded with another remat keeps it.
            A resumed run keeps the choice.
        seq_len: tokens per row, ≥ 2.
        packing: several documents share a row, isolated from each other. The model must support segments.
        learning_rate: peak rate; by default 4e-3, or with LoRA+ 4e-3 for lora_B and less for the rest, which
            was best for SmolLM2-135M (docs/choosing.md); 5e-4 if embeddings or norms are trained. Larger
            models need smaller rates. DAA and sparse adapters have their own, 1e-3 and 2e-4 (method.md,
            section 7).
        schedule: course of the rates after warm-up: "linear" or "cosine" down to 0, or "constant".
        warmup_ratio: fraction in [0, 1] of the steps over which the rates rise linearly from 0.
        warmup_steps: number of these steps, in place of the fraction.
        weight_decay: AdamW's weight decay, ≥ 0.
        max_grad_norm: global norm to which the gradient is clipped, > 0.
        seed: seed of shuffling and dropout, in the command also of the initial lora_A, in [0, 2³²).
        eval_every: steps between evaluations; by default only before the first and after the last step.
        eval_stride: tokens between the windows of an evaluation, 1 … seq_len; by default ``seq_len``.
        eval_tokens: evaluate on about this many tokens of the held-out documents; None takes all.
        keep: the adapter that the run ends with: that of the "last" step, or the "best", with the lowest
            held-out loss of all evaluations, the one before the first step included.
        patience: end the run after so many evaluations in a row without a new lowest held-out loss, ≥ 1. The
            rates still follow ``schedule`` over all ``steps``, so they may be high at that point.
        checkpoint_every: steps between checkpoints, ≥ 1; the last step always has one.
        keep_checkpoints: number of newest checkpoints kept, ≥ 1; with keep="best" also the best one.
        log_every: steps between lines of metrics.jsonl, ≥ 1.
        report_to: "wandb" sends the lines of metrics.jsonl to Weights & Biases: to the project hylorada, as a
            run named after ``output``, unless WANDB_PROJECT, WANDB_NAME or WANDB_MODE say otherwise.
            TensorBoard gets them whenever it is installed.
        resume: continue from the newest usable checkpoint of ``output`` (from the start if it has none).
        overwrite: delete the run that ``output`` holds, and nothing else.
        progress: show progress bars on stderr, and print each held-out perplexity.

    Raises:
        ConfigError: a value is out of range or contradicts another.

    Example:
        >>> TrainingConfig(output="runs/a", steps=200).rising_steps
        6
    """

    output: str | Path
    steps: int = 40
    epochs: float | None = None
    mesh: str = ""
    batch_size: int = 4
    microbatches: int | Literal["auto"] = 1
    remat: Remat = "auto"
    seq_len: int = 256
    packing: bool = True
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int | None = None
    eval_stride: int | None = None
    eval_tokens: int | None = 8192
    keep: Keep = "last"
    patience: int | None = None
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    log_every: int = 1
    report_to: Literal["wandb"] | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain_number(getattr(self, field.name)))
        for name in (
            "steps",
            "batch_size",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            self._require_int(name, 1)
        if self.microbatches != "auto":
            self._require_int("microbatches", 1)
        self._require_int("seq_len", 2)
        check_seed(self.seed)
        if self.warmup_steps is not None:
            self._require_int("warmup_steps", 0)
        if self.epochs is not None:
            self._require_number("epochs", positive=True)
        require_one_of("schedule", self.schedule, get_args(Schedule))
        require_one_of("keep", self.keep, get_args(Keep))
        mesh_sizes(self.mesh)
        require_one_of("remat", self.remat, get_args(Remat))
        if self.report_to is not None:
            require_one_of("report_to", self.report_to, ("wandb",))
        for name in ("eval_every", "eval_stride", "eval_tokens", "patience"):
            if getattr(self, name) is not None:
                self._require_int(name, 1)
        if self.learning_rate is not None:
            self._require_number("learning_rate", positive=True)
        self._require_number("max_grad_norm", positive=True)
        self._require_number("weight_decay", positive=False)
        self._require_number("warmup_ratio", positive=False)
        if self.warmup_ratio > 1:
            raise ConfigError(
                "warmup_ratio must be in [0, 1].", self.warmup_ratio, "Give a part of the steps, as 0.03."
            )
        if self.batch_size % self.passes:
            raise ConfigError(
                "microbatches must divide batch_size.",
                f"batch_size={self.batch_size}, microbatches={self.microbatches}",
                "Choose a batch_size that it divides.",
            )
        if self.eval_stride is not None and self.eval_stride > self.seq_len:
            raise ConfigError(
                "eval_stride must not exceed seq_len, or tokens would be left out.",
                f"eval_stride={self.eval_stride}, seq_len={self.seq_len}",
                "Choose a smaller stride.",
            )
        if self.needs_evaluations and self.eval_every is None:
            raise ConfigError(
                "Keeping the best and patience need evaluations on the way.",
                f"keep={self.keep}, patience={self.patience}, eval_every=None",
                "Give eval_every too, as a tenth of the steps.",
            )
        if self.resume and self.overwrite:
            raise ConfigError(
                "A run is either resumed or overwritten.",
                "both",
                "Choose one of resume and overwrite.",
            )

    @property
    def passes(self) -> int:
        """The microbatches, at least: 1 where they are still to be chosen."""
        return 1 if self.microbatches == "auto" else self.microbatches

    @property
    def needs_evaluations(self) -> bool:
        """Whether the held-out losses decide what the run ends with, or when."""
        return self.keep == "best" or self.patience is not None

    @property
    def rising_steps(self) -> int:
        """Steps over which the rates rise: ``warmup_steps``, or ⌈warmup_ratio · steps⌉; of one step 0."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.steps == 1:  # the first step of a warm-up has the rate 0
            return 0
        return math.ceil(fraction(self.warmup_ratio) * self.steps)

    def for_rows(self, rows: int) -> TrainingConfig:
        """The settings with the steps that the epochs come to: ⌈epochs · rows / batch_size⌉.

        Args:
            rows: those of the training data.

        Example:
            >>> TrainingConfig(output="runs/a", epochs=0.3, batch_size=4).for_rows(100).steps
            8
        """
        if self.epochs is None:
            return self
        steps = math.ceil(fraction(self.epochs) * rows / self.batch_size)
        return dataclasses.replace(self, steps=steps, epochs=None)

    def counted_steps(self) -> int:
        """The steps; a ConfigError where the epochs that stand for them are still to be counted."""
        if self.epochs is not None:
            raise ConfigError(
                "An optimizer of your own needs the number of steps.",
                f"epochs={self.epochs}",
                "Give steps, or training.for_rows(rows), with the rows of your training data.",
            )
        return self.steps

    def rate_for(self, adapter: HyLoRADAConfig) -> float:
        """The learning rate, or the adapter's default if none was given.

        Args:
            adapter: LoRA+ is read, and what is trained of the base.

        Example:
            >>> plus = HyLoRADAConfig(lora_plus_enabled=True, lora_plus_ratio=10.0)
            >>> TrainingConfig(output="runs/a").rate_for(plus)
            0.0004
            >>> TrainingConfig(output="runs/a").rate_for(HyLoRADAConfig(train_norms=True))
            0.0005
        """
        if self.learning_rate is not None:
            return self.learning_rate
        if adapter.train_embeddings or adapter.train_norms:
            return 5e-4
        return 4e-3 / (adapter.lora_plus_ratio if adapter.lora_plus_enabled else 1.0)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide which numbers a run computes: two runs that differ here are two runs.

        When it evaluates, what it keeps and when it stops are not among them: a run that has lost its
        patience can be resumed with more. What else a run is: :mod:`hylorada_jax.training.identity`.
        """
        free = (
            "output",
            "remat",
            "microbatches",
            "resume",
            "overwrite",
            "eval_every",
            "keep",
            "patience",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "report_to",
            "progress",
            "mesh",
        )
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}

    def _require_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be an integer ≥ {least}.", repr(value), "Correct this setting.")

    def _require_number(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (positive and value == 0):
            bound = "> 0" if positive else "≥ 0"
            raise ConfigError(
                f"{name} must be a finite number {bound}.", repr(value), "Correct this setting."
            )
