"""Whether large models can be tuned on slices of TPUs, by the compiler's figures, each method beside lora.

    python -m benchmarks.plans --output benchmarks/results/plans --page docs/results.md

Weights are bfloat16, or nf4 where that is said, and cut over all chips, each of which has one row, or those
that are said, and computes whole layers again in the backward pass. Figures are of one chip; what they are
stands in hylorada_jax/planning/cases.py.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import run, started
from benchmarks.report import check_page, fill_page, markdown
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


def main(*, output: Path, page: Path | None = None) -> None:
    """Compile every plan whose file is not there yet, and write it.

    Args:
        output: the directory of the files.
        page: a Markdown file whose table is replaced.
    """
    refuse_unusable(output)
    check_page(page, "plans")
    from parity_tests.environment import environment

    (libtpu,) = importlib.metadata.distributions(name="libtpu", path=[str(libtpu_directory())])
    output.mkdir(parents=True, exist_ok=True)
    for plan in PLANS:
        file = output / f"{plan.name}.json"
        if file.exists():
            continue
        found = {method: planned(plan, method) for method in plan.methods}
        record = {
            "command": started(),
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
    fill_page(page, "plans", table(recorded(output)))


def recorded(directory: Path) -> list[dict[str, Any]]:
    """The records that a directory has, the smallest models first."""
    plans = sorted(PLANS, key=lambda plan: (len(plan.shape), plan.shape, plan.topology, plan.seq_len))
    files = [directory / f"{plan.name}.json" for plan in plans]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def table(records: Sequence[dict[str, Any]]) -> str:
    """What a chip needs, method by method, as Markdown; what it sends, where the records have it.

    Args:
        records: one for each plan.
    """
    head = ["model, slice, row", "arguments, GiB", "temporary, GiB", "to LoRA's"]
    sent = any("sent_bytes" in one for record in records for one in record["methods"].values())
    rows = [[*head, *(["sent, GiB", "to LoRA's"] if sent else [])]]
    for record in records:
        shape = " in ".join(filter(None, (record["model"], record.get("base_dtype"))))
        for method, one in record["methods"].items():
            of_lora = one["to_lora"]
            row = [f"{shape}, {record['topology']}, {record['seq_len']:,} tokens: {method}"]
            row += [f"{one[name] / 2**30:.2f}" for name in ("argument_bytes", "temp_bytes")]
            row.append(_ratio(of_lora, "temp_bytes"))
            if sent:
                row.append(f"{sum(one['sent_bytes'].values()) / 2**30:.1f}" if "sent_bytes" in one else "")
                row.append(_ratio(of_lora, "sent_bytes"))
            rows.append(row)
    return f"{markdown(rows)}\n"


def _ratio(of_lora: dict[str, float], name: str) -> str:
    return f"{of_lora[name]:.2f}" if name in of_lora else ""


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
