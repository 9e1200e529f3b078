"""Which ways to train a model fit which devices, and how fast they may be: before there are any."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

from jax.sharding import AbstractMesh

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.placed import fitted
from hylorada_jax.placement.axes import AXES, leaves_room, mesh_sizes
from hylorada_jax.placement.placement import AUTO, Placement
from hylorada_jax.planning.cases import Case, Figures
from hylorada_jax.planning.chips import Chip
from hylorada_jax.planning.compiling import Compile
from hylorada_jax.planning.programs import model_of_shapes, step_arguments
from hylorada_jax.training.config import RematPolicy, TrainingConfig
from hylorada_jax.training.memory import beside_step, bytes_on_device
from hylorada_jax.training.optimizer import make_optimizer

# From the one that takes least memory on, each is faster than the one before it.
REMATS = get_args(RematPolicy)[::-1]


class Devices(NamedTuple):
    """What is planned for.

    Attributes:
        name: as the user writes it: a topology, or "here".
        chips: how many.
        chip: None of devices that are in no table.
        memory: bytes that a program may take on each; None where it is not known.
    """

    name: str
    chips: int
    chip: Chip | None
    memory: int | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        figures: the compiler's.
        fits: on each chip.
        excess: bytes that each chip lacks; 0 where it fits, None where nobody says how many.
        seconds: of a step at the chip's highest rates, an estimate that no run falls below.
        bound: which of them it is that of: "flops", "memory" or "links".
        tokens_per_second: of all chips, an estimate that no run exceeds.
    """

    figures: Figures
    fits: bool
    excess: int | None
    seconds: float | None = None
    bound: str | None = None
    tokens_per_second: float | None = None


def placement_on(mesh: str, count: int, base: CausalLM) -> Placement:
    """The placement on a mesh of so many devices, none of which needs to be there.

    Raises:
        ConfigError: the mesh does not multiply to them, or tensor does not divide the heads.
    """
    sizes = mesh_sizes(mesh, count)
    absent = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=AUTO)
    return fitted(Placement(absent), base)  # type: ignore[arg-type]


def argument_bytes(base: CausalLM, adapter: HyLoRADAConfig, mesh: str, count: int) -> int:
    """The bytes of weights, adapters and the optimizer's state on each device, known without a compiler."""
    model = model_of_shapes(base, adapter)
    training = TrainingConfig(output="none", batch_size=count)
    optimizer = make_optimizer(model.adapters, training, adapter)
    state, frozen, _ = step_arguments(model, placement_on(mesh, count, base), training, optimizer)
    return bytes_on_device((state, frozen))


def sensible_meshes(base: CausalLM, adapter: HyLoRADAConfig, devices: Devices) -> list[str]:
    """The meshes that are tried where the user names none.

    Weights cut over all devices; cut over the fewest that leave half of the memory, in copies; and heads cut
    in two and in four, the rest to fsdp.
    """
    count = devices.chips
    if count == 1:
        return [""]
    meshes = []
    if devices.memory is not None:
        roomy = (
            n
            for n in range(1, count)
            if count % n == 0
            and leaves_room(argument_bytes(base, adapter, f"fsdp={n}", count), devices.memory)
        )
        meshes += [f"data={count // n},fsdp={n}" for n in [*roomy][:1]]
    meshes += [f"fsdp={count}"]
    heads = base.config.num_attention_heads
    for tensor in (2, 4):
        if count % tensor == 0 and heads % tensor == 0 and count > tensor:
            meshes += [f"fsdp={count // tensor},tensor={tensor}"]
    return meshes


def plan(
    base: CausalLM,
    adapter: HyLoRADAConfig,
    devices: Devices,
    compiled: Compile,
    *,
    seq_len: int,
    meshes: Sequence[str],
    remats: Sequence[str] = REMATS,
    rows: Sequence[int] = (1,),
) -> Iterator[Row]:
    """Every way to train that is worth a look, as it is compiled.

    Of each mesh and number of rows, the remat that takes least memory comes first; where one does not fit, no
    faster one is tried. Where weights alone do not fit, nothing is compiled.

    Args:
        base: without weights, bfloat16.
        adapter: what is trained.
        devices: on what.
        compiled: of :mod:`hylorada_jax.planning.compiling`.
        seq_len: tokens of a row.
        meshes: as a user writes them.
        remats: what the backward pass computes again, in the order in which they need more memory.
        rows: that each part of data × fsdp computes.
    """
    model = model_of_shapes(base, adapter)
    for mesh in meshes:
        placement = placement_on(mesh, devices.chips, base)
        beside = beside_step(model, placement)
        arguments = argument_bytes(base, adapter, mesh, devices.chips)
        least = beside + arguments
        for number in rows:
            for remat in remats:
                case = Case(mesh, remat, number)
                if devices.memory is not None and least > devices.memory:
                    batch = number * placement.rows
                    figures = Figures(case, batch, argument_bytes=arguments, needed_bytes=least)
                elif (figures := compiled(case)).refused and figures.temp_bytes is not None:
                    needed = least + figures.temp_bytes
                    figures = dataclasses.replace(figures, argument_bytes=arguments, needed_bytes=needed)
                yield (row := _row(figures, devices, seq_len))
                if not row.fits:
                    break


def best(rows: Sequence[Row]) -> Row | None:
    """Of those that fit the one with the most tokens per second, by the estimate.

    Without one, as for a chip that is not known, the last of the first mesh with any: what is cut least.
    """
    fitting = [row for row in rows if row.fits]
    if not any(row.tokens_per_second for row in fitting):
        return next(
            (row for row in reversed(fitting) if row.figures.case.mesh == fitting[0].figures.case.mesh), None
        )
    return max(reversed(fitting), key=lambda row: row.tokens_per_second or 0)


def as_record(row: Row) -> dict[str, Any]:
    """A row as flat JSON."""
    values = dataclasses.asdict(row)
    figures = values.pop("figures")
    return Case(*figures.pop("case"))._asdict() | figures | values


def _row(figures: Figures, devices: Devices, seq_len: int) -> Row:
    limit, needed, chip = figures.limit_bytes or devices.memory, figures.needed_bytes, devices.chip
    over = None if limit is None or needed is None else needed - limit
    if figures.refused or (over or 0) > 0:
        return Row(figures, False, over)
    if chip is None or figures.flops is None or figures.bytes_accessed is None:
        return Row(figures, True, 0)
    seconds = {
        "flops": figures.flops / chip.flops,
        "memory": figures.bytes_accessed / chip.bandwidth,
        "links": sum((figures.sent_bytes or {}).values()) / chip.links,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    tokens = figures.batch_size * seq_len
    return Row(figures, True, 0, seconds[bound], bound, tokens / seconds[bound])
