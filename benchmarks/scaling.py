"""How a training step grows with the chips, by the TPU compiler's figures of one chip.

    python -m benchmarks.scaling --output benchmarks/results

LoRA on v5p, bfloat16, rows of 4096 tokens, whole layers computed again in the backward pass:

    weak     a row for each chip, weights cut over all of them
    strong   16 rows in all: where a chip has several, one after the other; where there are more chips than
             rows, weights are cut over 16 and heads over the rest

Every program is kept in scaling.json as soon as it is compiled, and none that is there is compiled again.
Of a model that so many chips cannot hold, the figures are those of two depths, carried on in a line: layers
are a loop, of which each takes the same.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.command import run, started
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.io.files import refuse_unusable, write_figure, write_json
from hylorada_jax.placement.axes import leaves_room
from hylorada_jax.planning.cases import Case
from hylorada_jax.planning.chips import CHIPS
from hylorada_jax.planning.compiling import for_topology
from hylorada_jax.planning.libtpu import libtpu_directory
from hylorada_jax.planning.shapes import SHAPES

TOPOLOGIES = {1: "v5p:1x1x1", 4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8"}
MODELS = ("llama-8b", "llama-70b")
ADAPTER = HyLoRADAConfig(method="lora")
ROWS = 16
SEQ_LEN = 4096
DEPTHS = (4, 8)
FIGURES = ("argument_bytes", "temp_bytes", "flops", "sent_bytes")


def weak(chips: int) -> Case:
    """A row for each chip."""
    return Case(f"fsdp={chips}", "full", 1)


def strong(chips: int) -> Case:
    """``ROWS`` in all."""
    if chips > ROWS:
        return Case(f"fsdp={ROWS},tensor={chips // ROWS}", "full", 1)
    return Case(f"fsdp={chips}", "full", 1, ROWS // chips)


def main(
    *, output: Path, models: tuple[str, ...] = MODELS, chips: tuple[int, ...] = tuple(TOPOLOGIES)
) -> None:
    """Compile what is missing of scaling.json, and draw scaling.png.

    Args:
        output: the directory of both.
        models: of ``SHAPES``.
        chips: numbers of chips, of ``TOPOLOGIES``.
    """
    refuse_unusable(output)
    from parity_tests.environment import environment

    (libtpu,) = importlib.metadata.distributions(name="libtpu", path=[str(libtpu_directory())])
    output.mkdir(parents=True, exist_ok=True)
    file = output / "scaling.json"
    programs = json.loads(file.read_text())["programs"] if file.exists() else {}
    for model in models:
        for count in chips:
            for growth in (weak, strong):
                name = name_of(model, count, growth(count))
                if name not in programs:
                    programs[name] = found = _figures(SHAPES[model], count, growth(count))
                    print(f"{name}: {found}", flush=True)
                    record = {
                        "command": started(),
                        "environment": environment() | {"libtpu": libtpu.version},
                        "method": ADAPTER.method,
                        "seq_len": SEQ_LEN,
                        "programs": programs,
                    }
                    write_json(file, record)
    draw(programs, output / "scaling.png")


def name_of(model: str, chips: int, case: Case) -> str:
    """The name of a program."""
    passes = f", {case.microbatches} microbatches" * (case.microbatches > 1)
    return f"{model} on {chips}: {case.mesh}{passes}"


def carried_on(figures: Mapping[int, Mapping[str, float]], layers: int) -> dict[str, float]:
    """The figures of a model of more layers, from those of two depths.

    Args:
        figures: by number of layers.
        layers: of the whole model.

    Example:
        >>> carried_on({4: {"flops": 10}, 8: {"flops": 18}}, 32)
        {'flops': 66.0}
    """
    (low, less), (high, more) = sorted(figures.items())
    return {
        name: less[name] + (more[name] - less[name]) / (high - low) * (layers - low) for name in sorted(less)
    }


def _figures(config: dict[str, Any], chips: int, case: Case) -> dict[str, float]:
    """Of a whole model; where a chip cannot hold its share, carried on from two depths."""
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.planning.plan import argument_bytes
    from hylorada_jax.planning.programs import base_of_shapes

    base, layers = base_of_shapes(DecoderConfig.from_hf(config)), config["num_hidden_layers"]
    held = argument_bytes(base, ADAPTER, case.mesh, chips)
    depths = [layers] if leaves_room(held, CHIPS["v5p"].memory) else [*DEPTHS]
    found = {}
    for depth in depths:
        shape = config | {"num_hidden_layers": depth}
        with for_topology(TOPOLOGIES[chips], shape, ADAPTER, SEQ_LEN) as compiled:
            figures = dataclasses.asdict(compiled(case))
        figures["sent_bytes"] = sum(figures["sent_bytes"].values())
        found[depth] = {name: figures[name] for name in FIGURES}
    return found[layers] if layers in found else carried_on(found, layers)


def draw(programs: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Draws what each chip has, computes and sends, by the number of chips.

    Args:
        programs: figures by :func:`name_of`; those that are missing leave a gap.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    panels = {
        "GiB in a chip's memory": lambda found: (found["argument_bytes"] + found["temp_bytes"]) / 2**30,
        "TFLOP of a chip in a step": lambda found: found["flops"] / 1e12,
        "GiB that a chip sends in a step": lambda found: found["sent_bytes"] / 2**30,
    }
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    for axes, (title, of) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for model, color in zip(MODELS, ("tab:blue", "tab:red"), strict=True):
            for growth, style in ((weak, "-"), (strong, "--")):
                names = {count: name_of(model, count, growth(count)) for count in TOPOLOGIES}
                known = {count: of(programs[name]) for count, name in names.items() if name in programs}
                if known:
                    label = f"{model}, {growth.__name__}"
                    axes.plot([*known], [*known.values()], style, color=color, marker="o", label=label)
        axes.set(xscale="log", title=title, xlabel="chips", xticks=[*TOPOLOGIES], xticklabels=[*TOPOLOGIES])
        axes.set_yscale("log") if "TFLOP" in title else axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    write_figure(file, figure)


if __name__ == "__main__":
    run(main)
