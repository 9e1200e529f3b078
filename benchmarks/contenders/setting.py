"""What all contenders have in common."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from hylorada_jax.errors import ModelError
from hylorada_jax.models.causal_lm import param_shapes
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.source import find_source
from hylorada_jax.training.config import TrainingConfig

RANK, ALPHA = 8, 16.0
RATE = 1e-3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}
WARMUP = 2  # steps of each contender before any is timed, or its memory read


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders have in common.

    Args:
        model: as for `load_model`, of a family that our decoder has.
        batch_size: rows per step.
        seq_len: tokens per row.
        dtype: of the frozen weights and the computation: float32 or bfloat16.
        steps: over which the learning rate falls to zero: those of a whole run.
        torch_threads: what torch computes with on a CPU.
        rank: of the adapters.
        alpha: their α.
        adapted: names of the adapted layers.
        remat: keep a layer's input alone for the backward pass, and compute the layer again.
    """

    model: str
    batch_size: int
    seq_len: int
    dtype: str
    steps: int
    torch_threads: int
    rank: int = RANK
    alpha: float = ALPHA
    adapted: tuple[str, ...] = ATTENTION
    remat: bool = False

    @property
    def training(self) -> TrainingConfig:
        """The rate; decay and clipping are the defaults of `TrainingConfig`."""
        return TrainingConfig(
            output="unused",
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            warmup_ratio=0.0,
            learning_rate=RATE,
        )

    @property
    def parameters(self) -> int:
        """Of the base model."""
        config = DecoderConfig.from_hf(find_source(self.model, config_only=True).config)
        return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config, "bfloat16")))

    def batch(self) -> dict[str, np.ndarray]:
        """The rows of every step: random "input_ids" and the "targets" that follow them.

        Raises:
            ModelError: the model is not found, or our decoder does not have its family.
        """
        config = find_source(self.model, config_only=True).config
        if config.get("model_type") not in DECODERS:
            raise ModelError(
                "The contenders share a model of a family that our decoder has: " + ", ".join(DECODERS),
                f"model_type {config.get('model_type')!r}",
                "Choose another model.",
            )
        size = (self.batch_size, self.seq_len + 1)
        tokens = np.random.default_rng(0).integers(config["vocab_size"], size=size, dtype=np.int32)
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that trains.

    Args:
        step: does one step on the batch and returns its loss, when all of it is done.
        trainable: number of trainable parameters.
        compile_seconds: what tracing and compiling the step took; None where nothing is compiled.
        program_bytes: memory of the compiled step: arguments, results and temporaries, what it updates in
            place counted once.
    """

    step: Callable[[], float]
    trainable: int
    compile_seconds: float | None = None
    program_bytes: int | None = None

    def timed(self) -> tuple[float, float, float]:
        """(seconds, CPU seconds, loss) of one step; no garbage is collected within it."""
        gc.collect()
        gc.disable()
        try:
            start, spent = time.perf_counter(), time.process_time()
            loss = self.step()
            return time.perf_counter() - start, time.process_time() - spent, loss
        finally:
            gc.enable()


def precision(setting: Setting) -> AbstractContextManager[Any]:
    """Within it, JAX multiplies float32 in float32 as torch does; by default a GPU would round to TF32."""
    return jax.default_matmul_precision("highest" if setting.dtype == "float32" else "default")


def describe(setting: Setting) -> dict[str, Any]:
    """The settings as they are recorded."""
    training = setting.training
    return dataclasses.asdict(setting) | {
        "warmup_steps": WARMUP,
        "parameters": setting.parameters,
        "dropout": 0.0,
        "tokens": "random, the same in every step",
        "optimizer": "AdamW",
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
    }
