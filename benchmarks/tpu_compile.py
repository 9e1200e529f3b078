"""Compiles every layer and every method's training step for TPUs, on a machine that has none.

    python -m benchmarks.tpu_compile --output benchmarks/results

It asserts nothing about speed: a program that compiles has shapes, memory and operations that the device
accepts, and its figures are the compiler's. Every record is of one device:

    flops, bytes_accessed   of one run of the program, loops counted as often as they run
    temp_bytes              memory beside arguments and results
    argument_bytes, output_bytes    what goes in and comes out; a training step returns its state in place
    to_lora                 the method's figures over those of lora
"""

import importlib.machinery
import importlib.metadata
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.command import run
from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.io.files import refuse_unusable, write_json

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MODEL = "smollm2-135m"
SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}


def libtpu_directory() -> Path:
    """Where libtpu is installed: with the other packages, or apart from them in ``<environment>/libtpu``.

    Apart, because JAX opens a TPU in every program that can import libtpu.

    Raises:
        HyLoRADAError: it is in neither place.
    """
    apart = Path(sys.prefix) / "libtpu"
    found = importlib.machinery.PathFinder.find_spec("libtpu", [*sys.path, str(apart)])
    if found is None or found.origin is None:
        raise HyLoRADAError(
            "Compiling for a TPU needs the package libtpu, though no TPU.",
            f"no libtpu on the module path, nor in {apart}",
            f"Run `make test`, or `pip install --no-deps --target {apart} -c constraints.txt libtpu`.",
        )
    return Path(found.origin).parents[1]


def use_libtpu() -> None:
    """Lets JAX compile for TPUs, though there is none; to be called before it is imported.

    Raises:
        HyLoRADAError: libtpu is not installed.
    """
    sys.path.append(str(libtpu_directory()))
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # else it asks the network which TPU this is
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nothing is opened that two processes could not share
        JAX_ENABLE_COMPILATION_CACHE="false",  # programs for a TPU that is not there cannot be read back
    )


def main(*, output: Path, topologies: tuple[str, ...] = TOPOLOGIES, small: bool = False) -> None:
    """Compile every layer and training step for TPUs, and write tpu-compile.json.

    Args:
        output: the directory that it is written to.
        topologies: of what TPUs; each has four chips, of which all but one step use one.
        small: of a tiny model instead of SmolLM2-135M, in a minute: what the test compiles.
    """
    refuse_unusable(output)
    use_libtpu()
    from benchmarks import tpu_programs
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.models.source import find_source
    from parity_tests.environment import environment

    config = DecoderConfig.from_hf(SMALL if small else find_source(MODEL, config_only=True).config)
    rows = {"batch_size": 4, "seq_len": 64 if small else 1024}
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.tpu_compile", *sys.argv[1:]]),
        "environment": environment() | {"libtpu": importlib.metadata.version("libtpu")},
        "model": SMALL if small else MODEL,
        "dtype": "bfloat16",
        **rows,
        "topologies": {},
    }
    output.mkdir(parents=True, exist_ok=True)
    for topology in topologies:
        devices = tpu_programs.topology_devices(topology)
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
        # After each, for a topology takes minutes.
        write_json(output / "tpu-compile.json", record)


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
