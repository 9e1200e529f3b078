"""The command that tells what fits before anything is rented."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hylorada_jax.cli.adapter import DEFAULTS, Adapter, AdapterOptions
from hylorada_jax.cli.flags import flag_of
from hylorada_jax.cli.shared import BaseDtype, puts_offline
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.models.packaged import PACKAGED_MODEL
from hylorada_jax.terminal import show
from hylorada_jax.text import to_json
from hylorada_jax.training.config import RematPolicy

if TYPE_CHECKING:
    from hylorada_jax.planning.plan import Devices, Row

HERE = "here"


@puts_offline
def plan(
    *,
    topology: str,
    model: str = PACKAGED_MODEL,
    adapter: Adapter = DEFAULTS,
    base_dtype: BaseDtype | None = None,
    seq_len: int = 4096,
    mesh: tuple[str, ...] = (),
    remat: tuple[RematPolicy, ...] = (),
    rows: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1,),
    json: bool = False,
    offline: bool = False,
) -> None:
    """Find how a model can be trained on TPUs, from its config alone; no TPU is needed.

    The real training step is compiled for them, with bfloat16 weights, adapters and optimizer state sharded
    over the mesh. Each compilation takes a minute or more, and a line of the table is printed after each.

    Args:
        topology: a TPU slice such as v5e:4x4, v5p:2x2x4 or v6e:2x4 (this needs the package libtpu), or here
            for this machine's devices.
        model: smollm2-135m, a directory with a config.json, a .gguf file, a Hub name, or a Llama-like
            shape: llama-1b, llama-8b, llama-32b, llama-70b.
        adapter: The method and its settings.
        base_dtype: as in finetune.
        seq_len: tokens per row.
        mesh: as in finetune; several are compared [weights sharded over all chips, over as few as leave half
            of the memory free, and heads split in 2 and in 4].
        remat: what the backward pass recomputes [full, then dots and none while they fit].
        rows: rows per step for each part of data × fsdp; several are compared.
        json: print one JSON object in place of the table.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    from hylorada_jax.planning.chips import parse_topology

    settings = adapter.build()
    for name, value, least in (("seq_len", seq_len, 2), *(("rows", each, 1) for each in rows)):
        if value < least:
            rule = f"{flag_of(name)} must be at least {least}."
            raise ConfigError(rule, str(value), "Choose a larger one.")
    if topology != HERE:
        parse_topology(topology)

    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.models.families import either
    from hylorada_jax.models.positions import check_range
    from hylorada_jax.planning import compiling, table
    from hylorada_jax.planning.plan import REMATS, best, placement_on, sensible_meshes
    from hylorada_jax.planning.plan import plan as planned
    from hylorada_jax.planning.programs import base_of_shapes
    from hylorada_jax.surgery.fit import fit
    from hylorada_jax.training.checks import check_groups

    check_groups(settings, seq_len)
    config = _config(model)
    base = base_of_shapes(DecoderConfig.from_hf(config), base_dtype)
    fit(base, settings)
    check_range((1, seq_len), limit=base.position_limit)
    devices = _devices(topology)
    for each in mesh:
        placement_on(each, devices.chips, base)
    # Of several chips "" is a copy of the weights on each, and finetune without --mesh may cut them.
    copies = f"data={devices.chips}" if devices.chips > 1 else ""
    meshes = [each.strip() or copies for each in mesh] or sensible_meshes(base, settings, devices)
    remats = [each for each in REMATS if not remat or each in remat]
    if topology == HERE:
        compilers = compiling.for_here(base, settings, seq_len)
    else:
        compilers = compiling.for_topology(topology, config, settings, seq_len, base_dtype)
    found: list[Row] = []
    with compilers as compiled:
        if not json:
            print(table.HEADER, flush=True)
        options: dict[str, Any] = {"seq_len": seq_len, "meshes": meshes, "remats": remats, "rows": rows}
        for row in planned(base, settings, devices, compiled, **options):
            found.append(row)
            if not json:
                print(table.line(row), flush=True)
    winner = best(found)
    command = None if winner is None else _command(model, adapter, base_dtype, seq_len, winner)
    if json:
        show(to_json(_record(devices, found, command)))
        return
    print(table.UNITS)
    if winner is None or command is None:
        ways = ["--remat full"] * ("full" not in remats) + ["--base-dtype nf4"] * (base_dtype is None)
        ways += ["more heads' shares (tensor in --mesh)"] * (devices.chips > 1)
        print(f"Nothing fits: try {either([*ways, 'shorter rows (--seq-len)', 'more chips'])}.")
        return
    if winner.seconds is not None:
        print(table.estimate(winner))
    print(f"each chip sends, in the best row: {table.sent_by_kind(winner)}\n\n{command}")


def _config(model: str) -> dict[str, Any]:
    """config.json's content of a model of our decoder's."""
    from hylorada_jax.models.families import DECODERS, either
    from hylorada_jax.models.source import find_source

    config = _shape(model) or find_source(model, config_only=True).config
    if config.get("model_type") not in DECODERS:
        raise ModelError(
            "A plan is made for models of our decoder.",
            f"model_type {config.get('model_type')!r}",
            f"Choose a model of type {either(DECODERS)}.",
        )
    return config


def _shape(model: str) -> dict[str, Any] | None:
    """config.json's content of a shape by its name, where no directory has that."""
    from hylorada_jax.planning.shapes import SHAPES

    return None if Path(model).exists() else SHAPES.get(model)


def _devices(topology: str) -> "Devices":
    from hylorada_jax.planning.chips import chip_of_kind, parse_topology
    from hylorada_jax.planning.plan import Devices

    if topology != HERE:
        chip, count = parse_topology(topology)
        return Devices(topology, count, chip, chip.memory)
    import jax

    from hylorada_jax.training.memory import device_memory

    return Devices(HERE, jax.device_count(), chip_of_kind(jax.devices()[0].device_kind), device_memory())


def _command(model: str, adapter: AdapterOptions, base_dtype: str | None, seq_len: int, row: "Row") -> str:
    """The way of a row as a command to paste."""
    case = row.figures.case
    words = ["hylorada", "finetune", "--model", "MODEL" if _shape(model) else model]
    words += ["--output", f"runs/{Path(model).resolve().name}"]
    for name, value in vars(adapter).items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    words += ["--mesh", case.mesh] if case.mesh else []
    words += ["--remat", case.remat, "--batch-size", str(row.figures.batch_size)]
    words += ["--seq-len", str(seq_len), "--dtype", "bfloat16"]
    return shlex.join([*words, "--base-dtype", base_dtype] if base_dtype else words)


def _record(devices: "Devices", rows: "list[Row]", command: str | None) -> dict[str, Any]:
    from hylorada_jax.planning.plan import as_record

    return {
        "topology": devices.name,
        "devices": devices.chips,
        "chip": None if devices.chip is None else devices.chip._asdict(),
        "rows": [as_record(row) for row in rows],
        "best": command,
    }
