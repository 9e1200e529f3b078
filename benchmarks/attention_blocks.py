"""Compiles the TPU kernels of attention in blocks of several sizes, on a machine that has no TPU.

    python -m benchmarks.attention_blocks --output benchmarks/results

Small blocks read keys and values, or queries, more often; large ones compute more of what causality hides,
and may not fit a core's memory. Every record is of forward and backward for one row: flops and
bytes_accessed as the kernels state them, temp_bytes as the compiler has it; null where it does not fit.
"""

from pathlib import Path
from typing import Any

from benchmarks.command import run, started
from benchmarks.tpu_compile import TOPOLOGIES
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.planning.libtpu import use_libtpu


def main(
    *,
    output: Path,
    topologies: tuple[str, ...] = TOPOLOGIES[:1],
    lengths: tuple[int, ...] = (4096, 32768),
    head_dims: tuple[int, ...] = (64, 128),
    blocks: tuple[int, ...] = (128, 256, 512, 1024),
    chips: int = 1,
) -> None:
    """Compile every kernel in every size of blocks, and write attention-blocks.json.

    Args:
        output: the directory that it is written to.
        topologies: of what TPUs.
        lengths: tokens of a row.
        head_dims: numbers of a head.
        blocks: tokens of a block.
        chips: that rows are divided over, one for each.
    """
    refuse_unusable(output)
    use_libtpu()
    import jax

    from benchmarks import tpu_programs
    from hylorada_jax.math.distance_attention import distance_attention
    from hylorada_jax.math.splash import splash_attention
    from hylorada_jax.planning.programs import topology_devices

    table = jax.ShapeDtypeStruct((64, 8), "float32")
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "splash": (splash_attention, {}),
        "distance": (distance_attention, {}),
        "distance, position bias": (distance_attention, {"position_bias": table}),
    }
    records = []
    for topology in topologies:
        devices = topology_devices(topology)[:chips]
        for length, head_dim, block in ((n, d, b) for n in lengths for d in head_dims for b in blocks):
            for name, (kernel, options) in kernels.items():
                try:
                    figures: Any = tpu_programs.compile_attention(
                        kernel, devices, length=length, head_dim=head_dim, block=block, **options
                    )
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    figures = None
                place = {"topology": topology, "kernel": name, "length": length, "head_dim": head_dim}
                records.append(place | {"block": block, "figures": figures})
                print(*place.values(), block, figures, flush=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "attention-blocks.json", {"command": started(), "records": records})


if __name__ == "__main__":
    run(main)
