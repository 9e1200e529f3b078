"""Compiles every layer and every method's training step for TPUs, on a machine that has none.

    python -m benchmarks.tpu_compile --output benchmarks/results
    python -m benchmarks.tpu_compile --output benchmarks/results --long-rows

It asserts nothing about speed: a program that compiles has shapes, memory and operations that the device
accepts, and its figures are the compiler's. Every record is of one device:

    flops, bytes_accessed   of one run of the program, loops counted as often as they run
    uncopied_bytes          bytes_accessed without the copies between a TPU's memories that other operations
                            overlap: the compiler makes them where there is room
    temp_bytes              memory beside arguments and results
    argument_bytes, output_bytes    what goes in and comes out; a training step returns its state in place
    to_lora                 the method's figures over those of lora
    compile_cpu_seconds     of a long row's step: what compiling it took of one core or more
"""

import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.command import run, started
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.planning.libtpu import use_libtpu
from hylorada_jax.planning.shapes import SHAPES

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MODEL = "smollm2-135m"
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}
SMALL_LONG = 2048
LLAMA_1B = SHAPES["llama-1b"]
QWEN3 = {  # the shape of Qwen3 0.6B
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
# A model's shape, method, rows, tokens and remat.
LongRow: TypeAlias = tuple[str | dict[str, Any], str, int, int, str]
# The steps whose memory is that of attention.
LONG_ROWS: dict[str, LongRow] = {
    **{
        f"llama-1b {method} 1 × 4096, remat full": (LLAMA_1B, method, 1, 4096, "full")
        for method in ("lora", "hylorada", "hylorada_v1", "dora", "hylorada_v2", "lorada")
    },
    "smollm2-135m lora 4 × 1024": (MODEL, "lora", 4, 1024, "none"),
    **{
        f"{layers} layers of qwen3-0.6b lora 2 × 2048": (
            QWEN3 | {"num_hidden_layers": layers},
            "lora",
            2,
            2048,
            "none",
        )
        for layers in (4, 8, 64)  # the last two: the time to compile does not grow
    },
    **{
        f"llama-1b {method} 1 × 32768, remat full": (LLAMA_1B, method, 1, 32768, "full")
        for method in ("lora", "hylorada")
    },
}
# Of the same widths, with fewer layers and tokens in the vocabulary: both compile in about a minute.
SMALL_LONG_ROWS: dict[str, LongRow] = {
    f"4 layers of llama-1b {method} 1 × 4096, remat full": (
        LLAMA_1B | {"num_hidden_layers": 4, "vocab_size": 2048},
        method,
        1,
        4096,
        "full",
    )
    for method in ("lora", "hylorada_v1")
}


def main(
    *, output: Path, topologies: tuple[str, ...] = TOPOLOGIES, small: bool = False, long_rows: bool = False
) -> None:
    """Compile every layer and training step for TPUs, and write tpu-compile.json.

    Args:
        output: the directory that it is written to.
        topologies: of what TPUs; each has four chips, of which all but one step use one.
        small: of a tiny model instead of SmolLM2-135M, in a minute: what the test compiles.
        long_rows: the steps of ``LONG_ROWS`` instead (of ``SMALL_LONG_ROWS`` with small), for the first
            topology, into tpu-compile-long.json.
    """
    refuse_unusable(output)
    use_libtpu()
    from benchmarks import tpu_programs
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.models.source import find_source
    from hylorada_jax.planning.programs import topology_devices
    from parity_tests.environment import environment

    output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "command": started(),
        "environment": environment() | {"libtpu": importlib.metadata.version("libtpu")},
        "dtype": "bfloat16",
    }
    if long_rows:
        devices = topology_devices(topologies[0])[:1]
        record |= {"device": devices[0].device_kind, "steps": {}}
        programs, steps = SMALL_LONG_ROWS if small else LONG_ROWS, record["steps"]
        for name, row in programs.items():  # written after each, for they take minutes
            steps |= _reported(f"{topologies[0]} step", _long_row(name, row, devices))
            lora = steps[name.replace(row[1], "lora")]
            steps[name] = steps[name] | {"to_lora": tpu_programs.to_lora(steps[name], lora)}
            write_json(output / "tpu-compile-long.json", record)
        return
    config = DecoderConfig.from_hf(SMALL if small else find_source(MODEL, config_only=True).config)
    # Of a small model 128 tokens a device, the fewest that the kernel of the loss takes at a time.
    rows: dict[str, Any] = {"batch_size": 8, "seq_len": 64} if small else {"batch_size": 4, "seq_len": 1024}
    record |= {"model": SMALL if small else MODEL, **rows, "topologies": {}}
    for topology in topologies:
        devices = topology_devices(topology)
        layers = _reported(f"{topology} layer", tpu_programs.compile_layers(devices))
        steps = _reported(f"{topology} step", tpu_programs.compile_steps(config, devices[:1], **rows))
        on_all = tpu_programs.compile_step("hylorada", config, devices, **rows)
        record["topologies"][topology] = {
            "device": devices[0].device_kind,
            "layers": layers,
            "steps": {
                method: figures | {"to_lora": tpu_programs.to_lora(figures, steps["lora"])}
                for method, figures in steps.items()
            },
            f"steps_on_{len(devices)}_devices": {"hylorada": on_all},
        }
        if small:  # LONG_ROWS for those who cannot wait
            long_step = tpu_programs.compile_step(
                "hylorada", config, devices[:1], batch_size=1, seq_len=SMALL_LONG
            )
            record["topologies"][topology]["long_step"] = long_step
        # After each, for a topology takes minutes.
        write_json(output / "tpu-compile.json", record)


def _long_row(name: str, row: LongRow, devices: Sequence[Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, record) of one step of ``LONG_ROWS``."""
    from benchmarks.tpu_programs import compile_step
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.models.source import find_source

    shape, method, batch_size, seq_len, remat = row
    hf = find_source(shape, config_only=True).config if isinstance(shape, str) else shape
    settings: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "remat": remat}
    start = time.process_time()  # of all threads, so that a busy machine counts less
    figures = compile_step(method, DecoderConfig.from_hf(hf), devices, **settings)
    yield name, figures | {"compile_cpu_seconds": round(time.process_time() - start, 1)}


def _reported(what: str, programs: Iterable[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The records by name; a line for each when it is compiled."""
    records, start = {}, time.perf_counter()
    for name, record in programs:
        records[name] = record
        figures = ", ".join(f"{figure} {value:.4g}" for figure, value in record.items())
        print(f"{what} {name}: {figures} ({time.perf_counter() - start:.0f} s)", flush=True)
        start = time.perf_counter()
    return records


if __name__ == "__main__":
    run(main)
