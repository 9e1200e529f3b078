"""Whether large models can be tuned on slices of TPUs, by the compiler's figures, each method beside lora.

    python -m benchmarks.plans --output benchmarks/results/plans

Weights are bfloat16 and cut over all chips, each of which has one row and computes whole layers again in the
backward pass. Figures are of one chip; what they are stands in hylorada_jax/planning/cases.py.
"""

import importlib.metadata
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.command import run
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.planning.libtpu import libtpu_directory

# Shape, topology, tokens of a row, methods.
PLANS = (
    ("llama-8b", "v5e:2x2", 4096, ("lora", "dora", "hylorada")),
    ("llama-70b", "v6e:4x4", 8192, ("lora", "hylorada")),
    ("llama-32b", "v5e:4x4", 4096, ("lora", "hylorada")),
    ("llama-8b", "v5e:2x4", 8192, ("lora", "dora", "hylorada")),
    ("llama-70b", "v5p:2x2x4", 8192, ("lora", "hylorada")),
    ("llama-32b", "v6e:2x4", 4096, ("lora", "hylorada")),
    ("llama-8b", "v5e:2x2", 8192, ("lora", "dora", "hylorada")),
    ("llama-8b", "v5e:2x4", 4096, ("lora", "dora", "hylorada")),
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
    for shape, topology, seq_len, methods in PLANS:
        file = output / f"{shape}-{topology.replace(':', '-')}-{seq_len}.json"
        if file.exists():
            continue
        found = {method: planned(shape, topology, seq_len, method) for method in methods}
        record = {
            "command": shlex.join(["python", "-m", "benchmarks.plans", *sys.argv[1:]]),
            "environment": environment() | {"libtpu": libtpu.version},
            "model": shape,
            "topology": topology,
            "seq_len": seq_len,
            "methods": {
                method: figures | {"to_lora": _to_lora(figures, found["lora"])}
                for method, figures in found.items()
            },
        }
        write_json(file, record)


def planned(shape: str, topology: str, seq_len: int, method: str) -> dict[str, Any]:
    """The one row of a plan, cut over all chips, with remat full and a row for each."""
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.planning import compiling, plan, table
    from hylorada_jax.planning.chips import parse_topology
    from hylorada_jax.planning.programs import base_of_shapes
    from hylorada_jax.planning.shapes import SHAPES

    config, adapter = SHAPES[shape], HyLoRADAConfig(method=method)
    base = base_of_shapes(DecoderConfig.from_hf(config))
    chip, count = parse_topology(topology)
    devices = plan.Devices(topology, count, chip, chip.memory)
    with compiling.for_topology(topology, config, adapter, seq_len) as compiled:
        settings: dict[str, Any] = {"seq_len": seq_len, "meshes": [f"fsdp={count}"], "remats": ["full"]}
        (row,) = plan.plan(base, adapter, devices, compiled, **settings)
    print(f"{shape} {topology} {seq_len} {method}: {table.line(row)}", flush=True)
    return plan.as_record(row)


def _to_lora(figures: dict[str, Any], lora: dict[str, Any]) -> dict[str, float]:
    """How many times lora's figures a method's are, of those that fit."""
    if not (figures["fits"] and lora["fits"]):
        return {}
    sent = (sum(each["sent_bytes"].values()) for each in (figures, lora))
    ratios = {"temp_bytes": figures["temp_bytes"] / lora["temp_bytes"], "sent_bytes": next(sent) / next(sent)}
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


if __name__ == "__main__":
    run(main)
