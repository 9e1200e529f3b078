"""The fastest setting of a training step whose program fits a device, found without running it."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.quantized import bits_of
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.placement.placement import Placement
from hylorada_jax.placement.processes import everywhere
from hylorada_jax.surgery.split import split, unfrozen_paths
from hylorada_jax.training.config import Remat, RematPolicy, TrainingConfig
from hylorada_jax.training.step import Metrics, TrainState

Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


class Setting(NamedTuple):
    """What a step gives up speed for, to take less memory.

    Attributes:
        remat: what the backward pass recomputes.
        microbatches: passes over parts of the rows.
    """

    remat: Remat
    microbatches: int

    def __str__(self) -> str:
        passes = f"{self.microbatches} microbatch" + "es" * (self.microbatches > 1)
        return f"remat {self.remat}, {passes}"


class Choice(NamedTuple):
    """A setting, its step, and what the compiler says of it.

    Attributes:
        setting: what was chosen.
        step: compiled where a device's memory had to be compared.
        needed: bytes that training takes on a device; None where the step was not compiled ahead.
        limit: bytes that there are; None where the device does not say.
    """

    setting: Setting
    step: Step
    needed: int | None = None
    limit: int | None = None

    def __str__(self) -> str:
        if self.needed is None or self.limit is None:
            return f"{self.setting}: the device states no limit"
        return f"{self.setting}: training needs {_gib(self.needed)} of {_gib(self.limit)}"


def device_memory() -> int | None:
    """The bytes that a program may take on each of the devices; None where they do not say, as CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [each["bytes_limit"] for each in stats if "bytes_limit" in each]
    # Of all processes, so that they choose the same.
    return min((limit for limit in everywhere(min(limits, default=None)) if limit is not None), default=None)


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """The bytes that a program takes on each device: arguments + temporaries + outputs − aliased.

    Example:
        >>> x = jax.ShapeDtypeStruct((256,), "float32")
        >>> needed_bytes(jax.jit(lambda x: x + 1).lower(x).compile())
        2048
    """
    memory: Any = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def bytes_on_device(tree: Any) -> int:
    """The bytes of a tree's arrays, or of their shapes, on each device.

    Args:
        tree: of leaves with shardings.

    Example:
        >>> bytes_on_device({"a": jax.numpy.ones((2, 8)), "b": jax.numpy.ones(4, "bfloat16")})
        72
    """
    bits = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits_of(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )
    return sum(bits) // 8


def beside_step(model: HyLoRADAModel, placement: Placement) -> int:
    """The bytes on each device that training keeps and its step does not take: what the model itself holds.

    These are the adapters that it starts with, which the state is a copy of, and the base's own leaves of
    what trains itself, such as an embedding table.

    Args:
        model: to be trained.
        placement: where its leaves lie.
    """
    own = split(model.base.params, unfrozen_paths(model.sites))[1]
    return bytes_on_device(placement.shapes((model.adapters, own)))


def candidates(config: TrainingConfig, *, own: str | None, devices: int) -> list[Setting]:
    """The settings that may be chosen, the fastest first; each needs less memory than the one before it.

    First more is recomputed in one pass, then the rows are computed in more passes.

    Args:
        config: remat and microbatches are those settings, or "auto".
        own: the model's remat, kept under "auto" unless it is "none"; None of a model that knows no remat.
        devices: that divide the rows of a microbatch.

    Example:
        >>> auto = TrainingConfig(output="runs/a", batch_size=4, microbatches="auto")
        >>> [tuple(setting) for setting in candidates(auto, own="none", devices=2)]
        [('none', 1), ('dots', 1), ('full', 1), ('full', 2)]
    """
    rows = config.batch_size
    if config.remat != "auto":
        remats: Sequence[Any] = (config.remat,)
    elif own in (None, "none"):
        remats = get_args(RematPolicy) if own else ("none",)
    else:
        remats = (own,)
    if config.microbatches == "auto":
        passes = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n % devices == 0]
    else:
        passes = [config.microbatches]
    return [Setting(remat, passes[0]) for remat in remats] + [Setting(remats[-1], n) for n in passes[1:]]


def choose(
    settings: Sequence[Setting],
    step_of: Callable[[Setting], jax.stages.Wrapped],
    arguments: Callable[[], Sequence[Any]],
    limit: int | None,
    *,
    beside: int = 0,
    remedy: str = "Choose shorter rows (seq_len) or a smaller batch_size.",
) -> Choice:
    """The first setting whose step fits, by the compiler's figures; nothing is run.

    Args:
        settings: of :func:`candidates`; before these may stand one that is taken wherever it fits.
        step_of: a setting's step, jitted.
        arguments: gives those of the steps, or their shapes; asked for where something is compiled.
        limit: the bytes that there are on each device; None takes the first setting, and compiles nothing.
        beside: bytes that are taken on each device beside the step, of :func:`beside_step`.
        remedy: of the error.

    Returns:
        The setting with its step; the program that was measured is the one that trains. The setting before
        it was measured too, and does not fit.

    Raises:
        ConfigError: none fits.
    """
    if limit is None:
        return Choice(settings[0], step_of(settings[0]))

    @functools.cache
    def compiled(number: int) -> jax.stages.Compiled | str:
        """The program; what the compiler says where it makes none that the device could not hold."""
        try:
            return step_of(settings[number]).lower(*arguments()).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return str(error)

    def fits(number: int) -> bool:
        program = compiled(number)
        return not isinstance(program, str) and beside + needed_bytes(program) <= limit

    # Most steps fit as they are: one compilation. Else by halves.
    number = 0 if fits(0) else bisect_left(range(len(settings)), True, lo=1, key=fits)
    program = compiled(min(number, len(settings) - 1))
    if isinstance(program, str):
        why = program
    elif (needed := beside + needed_bytes(program)) > limit:
        why = f"{needed:,} bytes needed, {needed - limit:,} more than the {limit:,} that there are"
    else:
        return Choice(settings[number], program, needed, limit)
    raise ConfigError(
        "A training step must fit the memory of a device.", f"with {settings[-1]}: {why}", remedy
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
