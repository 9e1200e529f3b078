"""Whether large models can be tuned on slices of TPUs, by the compiler's figures, each method beside lora.

    python -m benchmarks.plans --output benchmarks/results/plans

Weights are bfloat16, or nf4 where that is said, and cut over all chips, each of which has one row, or those
that are said, and computes whole layers again in the backward pass. Figures are of one chip; what they are
stands in hylorada_jax/planning/cases.py.
"""

import importlib.metadata
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import run
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.planning.libtpu import libtpu_directory


class Plan(NamedTuple):
    """What is compiled: a shape, for a slice, its rows and their tokens, and methods."""

    shape: str
    topology: str
    seq_len: int
    methods: tuple[str, ...] = ("lora", "hylorada")
    rows: int = 1
    base_dtype: str | None = None

    @property
    def name(self) -> str:
        """Of the file."""
        words = [self.shape, self.topology.replace(":", "-"), str(self.seq_len), self.base_dtype]
        return "-".join(filter(None, words))


THREE = ("lora", "dora", "hylorada")
PLANS = (
    Plan("llama-8b", "v5e:1x1", 2048, rows=2, base_dtype="nf4"),
    Plan("llama-8b", "v5e:2x2", 4096, THREE),
    Plan("llama-70b", "v6e:4x4", 8192),
    Plan("llama-32b", "v5e:4x4", 4096),
    Plan("llama-8b", "v5e:2x4", 8192, THREE),
    Plan("llama-70b", "v5p:2x2x4", 8192),
    Plan("llama-32b", "v6e:2x4", 4096),
    Plan("llama-8b", "v5e:2x2", 8192, THREE),
    Plan("llama-8b", "v5e:2x4", 4096, THREE),
)


def main(*, output: Path) -> None:
    """Compile every plan whose file is not there yet, and write it.

    Args:
        output: the directory of the files.
    """
    refuse_unusable(output)
    from parity_tests.environment import environment

    (libtpu,) = importlib.metadata.distributions(name="libtpu", path=[str(libtpu_directory())])
    output.mkdir(parents=True, exist_ok=True)
    for plan in PLANS:
        file = output / f"{plan.name}.json"
        if file.exists():
            continue
        found = {method: planned(plan, method) for method in plan.methods}
        record = {
            "command": shlex.join(["python", "-m", "benchmarks.plans", *sys.argv[1:]]),
            "environment": environment() | {"libtpu": libtpu.version},
            "model": plan.shape,
            "topology": plan.topology,
            "seq_len": plan.seq_len,
            "base_dtype": plan.base_dtype,
            "methods": {
                method: figures | {"to_lora": _to_lora(figures, found["lora"])}
                for method, figures in found.items()
            },
        }
        write_json(file, record)


def planned(plan: Plan, method: str) -> dict[str, Any]:
    """The one row of a plan, cut over all chips, with remat full."""
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.planning import compiling, table
    from hylorada_jax.planning.chips import parse_topology
    from hylorada_jax.planning.plan import Devices, as_record
    from hylorada_jax.planning.plan import plan as rows_of
    from hylorada_jax.planning.programs import base_of_shapes
    from hylorada_jax.planning.shapes import SHAPES

    config, adapter = SHAPES[plan.shape], HyLoRADAConfig(method=method)
    base = base_of_shapes(DecoderConfig.from_hf(config), plan.base_dtype)
    chip, count = parse_topology(plan.topology)
    devices = Devices(plan.topology, count, chip, chip.memory)
    step = (plan.topology, config, adapter, plan.seq_len, plan.base_dtype)
    with compiling.for_topology(*step) as compiled:
        settings: dict[str, Any] = {"meshes": [f"fsdp={count}"], "remats": ["full"], "rows": [plan.rows]}
        (row,) = rows_of(base, adapter, devices, compiled, seq_len=plan.seq_len, **settings)
    print(f"{plan.name} {method}: {table.line(row)}", flush=True)
    return as_record(row)


def _to_lora(figures: dict[str, Any], lora: dict[str, Any]) -> dict[str, float]:
    """How many times lora's figures a method's are, of those that fit."""
    if not (figures["fits"] and lora["fits"]):
        return {}
    ratios = {"temp_bytes": figures["temp_bytes"] / lora["temp_bytes"]}
    sent, of_lora = (sum(each["sent_bytes"].values()) for each in (figures, lora))
    if of_lora:  # one chip sends nothing
        ratios["sent_bytes"] = sent / of_lora
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


if __name__ == "__main__":
    run(main)
