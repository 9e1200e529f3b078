"""A training step of tunix's Llama 3 with our adapters beside qwix's LoRA: time, flops, bytes, memory.

    pip install --no-deps google-tunix clu google-metrax tensorboardX sentencepiece einops perfetto
    python -m benchmarks.nnx_tunix --output benchmarks/results

All have the same weights, batch, rank, adapted layers (q, k, v, o) and AdamW. Of each, nnx-tunix.json has the
compiler's figures of the step in bfloat16 for a TPU v5e, which need none (as in benchmarks.tpu_compile), and
on the CPU in float32 the seconds of the timed steps. A round runs a step of each, and each round begins with
another one.

    to_qwix                 the figures over those of "qwix lora"
    paired_ratio_to_qwix    the median of the ratios of seconds within each round
    paired_cpu_ratio_to_qwix    the same of CPU seconds, on which other work on the machine tells less
"""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import run, started
from benchmarks.step_time import paired_ratio, rotated
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.planning.libtpu import use_libtpu

BASELINE = "qwix lora"
NAMES = (BASELINE, "lora", "hylorada_v1")
# SmolLM2-135M's layers, four of them, and a smaller vocabulary: its loss is the same for all.
SHAPE: dict[str, Any] = {
    "num_layers": 4, "vocab_size": 4096, "embed_dim": 576, "hidden_dim": 1536, "num_heads": 9,
    "num_kv_heads": 3, "head_dim": 64, "rope_theta": 10_000, "norm_eps": 1e-5, "weight_tying": True,
}  # fmt: skip
RANK, ALPHA = 8, 16.0


def main(
    *,
    output: Path,
    topology: str = "v5e:2x2",
    tpu: tuple[int, int] = (4, 1024),
    cpu: tuple[int, int] = (2, 256),
    rounds: int = 12,
) -> None:
    """Compile and time the steps, and write nnx-tunix.json.

    Args:
        output: the directory that it is written to.
        topology: whose first chip the steps are compiled for.
        tpu: rows of a step and their tokens there.
        cpu: the same of the steps that are timed.
        rounds: timed steps of each contender; 0 compiles for the TPU alone.
    """
    refuse_unusable(output)
    use_libtpu()
    import jax
    from jax.sharding import SingleDeviceSharding

    from benchmarks.tpu_programs import record, to_lora
    from hylorada_jax.planning.programs import topology_devices
    from parity_tests.environment import environment

    (chip, *_) = topology_devices(topology)
    figures = {}
    for name in NAMES:
        step, arguments = contender(name, *tpu)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, in_bfloat16(x.dtype), sharding=SingleDeviceSharding(chip)
            ),
            arguments,
        )
        figures[name] = record(step.lower(*shapes).compile())
        print(name, figures[name], flush=True)
    times = timed({name: contender(name, *cpu) for name in NAMES}, rounds) if rounds else {}
    contenders: dict[str, Any] = {}
    for name, own in figures.items():
        contenders[name] = {"tpu": own | {"to_qwix": to_lora(own, figures[BASELINE])}}
        if rounds:
            ratio, of_cores = (
                paired_ratio(times[name][own], times[BASELINE][own]) for own in ("seconds", "cpu_seconds")
            )
            ratios = {"paired_ratio_to_qwix": ratio, "paired_cpu_ratio_to_qwix": of_cores}
            contenders[name]["cpu"] = times[name] | ratios
            print(f"{name}: {ratio:.3f} of qwix's time, {of_cores:.3f} of its CPU time")
    about = environment()
    packages = {name: importlib.metadata.version(name) for name in ("google-tunix", "qwix")}
    about["versions"] = about["versions"] | packages  # type: ignore[operator]
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "nnx-tunix.json",
        {
            "command": started(),
            "environment": about,
            "device": chip.device_kind,
            "shape": SHAPE,
            "rank": RANK,
            "tpu": tpu,
            "cpu": cpu,
            "contenders": contenders,
        },
    )


def in_bfloat16(dtype: Any) -> Any:
    """The dtype that a leaf has on the TPU."""
    return "bfloat16" if dtype == "float32" else dtype


def contender(name: str, batch_size: int, seq_len: int) -> tuple[Any, tuple[Any, ...]]:
    """A jitted step (adapters, state of AdamW, frozen, ids) → (adapters, state, loss), and its arguments."""
    import jax
    import jax.numpy as jnp
    import optax
    import qwix  # type: ignore[import-untyped]
    from flax import nnx
    from tunix.models.llama3 import model as llama3
    from tunix.sft.utils import make_causal_attn_mask

    from hylorada_jax import HyLoRADAConfig
    from hylorada_jax.config import QKVO
    from hylorada_jax.nnx import adapt

    model = llama3.Llama3(llama3.ModelConfig(**SHAPE), rngs=nnx.Rngs(0))
    if name == BASELINE:
        lora = qwix.LoraProvider(module_path=r".*\b[qkvo]_proj", rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(model, lora, **model.get_model_input(), rngs=nnx.Rngs(1))
    else:
        config = HyLoRADAConfig(method=name, lora_rank=RANK, lora_alpha=ALPHA, target_modules=QKVO)
        adapt(model, config, nnx.Rngs(1))
    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    optimizer = optax.adamw(1e-4)
    positions = jnp.broadcast_to(jnp.arange(seq_len), (batch_size, seq_len))
    mask = make_causal_attn_mask(jnp.ones((batch_size, seq_len), bool))

    def loss(adapters: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, adapters, frozen)(ids, positions, None, mask)[0].astype(jnp.float32)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    def step(adapters: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(adapters, frozen, ids)
        updates, state = optimizer.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    ids = jax.random.randint(jax.random.key(2), (batch_size, seq_len), 0, SHAPE["vocab_size"])
    return jax.jit(step, donate_argnums=(0, 1)), (adapters, optimizer.init(adapters), frozen, ids)


def timed(
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """The "seconds" and "cpu_seconds" of every contender's steps, without the first two, which compile."""
    import jax

    names = [*programs]
    times: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in names}
    states = {name: arguments for name, (_, arguments) in programs.items()}
    for round_ in range(-2, rounds):
        for name in rotated(names, round_):
            adapters, state, frozen, ids = states[name]
            start, spent = time.perf_counter(), time.process_time()
            adapters, state, _loss = jax.block_until_ready(programs[name][0](adapters, state, frozen, ids))
            if round_ >= 0:
                times[name]["seconds"].append(time.perf_counter() - start)
                times[name]["cpu_seconds"].append(time.process_time() - spent)
            states[name] = adapters, state, frozen, ids
    return times


if __name__ == "__main__":
    run(main)
