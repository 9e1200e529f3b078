"""Layers and training steps, compiled for TPUs that are described and not there."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hylorada_jax.config import METHODS, QKVO, HyLoRADAConfig
from hylorada_jax.math.loss import chosen_chunks, token_nll
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.placement.placement import Placement
from hylorada_jax.planning import programs
from hylorada_jax.planning.hlo_cost import program_cost
from hylorada_jax.training.config import TrainingConfig
from parity_tests.layers import LAYERS, Draw
from parity_tests.measure import jax_side, measured_in, precision

Record = dict[str, float]

# SmolLM2-135M's q_proj, and rows long enough for distances beyond the first buckets.
LAYER_DRAW = Draw(seq=64, d_in=576, d_out=576, rank=8, alpha=16.0)
# The ratios to lora that are worth a look.
COMPARED = ("flops", "bytes_accessed", "uncopied_bytes", "temp_bytes")


def compile_layers(devices: Sequence[Any]) -> Iterator[tuple[str, Record]]:
    """(name, record) of every registered layer, forward and gradient in one program, on one device.

    In bfloat16, or float32 where a layer sees no hidden states; products as the parity suite has them.
    """
    for name, layer in LAYERS.items():
        case = layer.case(LAYER_DRAW)
        dtype = "bfloat16" if measured_in(case, "bfloat16") else "float32"
        with precision(dtype):
            run, arguments = jax_side(case, dtype)
            shapes = _on(_mesh(devices[:1]), arguments)
            compiled = jax.jit(run).lower(*shapes).compile()
        yield name, record(compiled)


def compile_steps(
    config: DecoderConfig, devices: Sequence[Any], *, batch_size: int, seq_len: int
) -> Iterator[tuple[str, Record]]:
    """(method, record) of the training step of every method."""
    for method in METHODS:
        yield method, compile_step(method, config, devices, batch_size=batch_size, seq_len=seq_len)


def compile_step(
    method: str,
    config: DecoderConfig,
    devices: Sequence[Any],
    *,
    batch_size: int,
    seq_len: int,
    remat: str = "none",
) -> Record:
    """The record of :func:`compiled_step` where every token is scored, which costs most."""
    rows = {"batch_size": batch_size, "seq_len": seq_len}
    compiled = compiled_step(method, config, devices, **rows, remat=remat)
    tokens = batch_size * seq_len // len(devices)
    size = programs.loss_chunk(config, tokens, programs.mesh_of_devices(devices))
    return record(compiled, turns=math.ceil(tokens / size))


def compiled_step(
    method: str,
    config: DecoderConfig,
    devices: Sequence[Any],
    *,
    batch_size: int,
    seq_len: int,
    remat: str = "none",
) -> jax.stages.Compiled:
    """A method's training step over a bfloat16 base, its rows divided over the devices.

    Every method with linear adapters has them of rank 8 on q, k, v and o, so that their figures compare.

    Args:
        method: a key of ``METHODS``.
        config: the base model's shape.
        devices: from :func:`hylorada_jax.planning.programs.topology_devices`.
        batch_size: rows, over all devices.
        seq_len: tokens per row.
        remat: what is computed again in the backward pass.
    """
    adapter = HyLoRADAConfig(method=method, target_modules=QKVO if METHODS[method]["roles"] else None)
    rows: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "remat": remat}
    training = TrainingConfig(output="unused", **rows)
    model = programs.model_of_shapes(programs.base_of_shapes(config), adapter)
    return programs.compiled_step(model, Placement(programs.mesh_of_devices(devices)), training)


def compile_loss(vocab: int, width: int, chunk: int | None, device: Any, *, tokens: int) -> Record:
    """The record of the loss of scored tokens in bfloat16, with its gradient, in chunks of so many.

    None: by the kernel.
    """
    shapes = [((1, tokens, width), "bfloat16"), ((vocab, width), "bfloat16"), ((1, tokens), "int32")]
    arguments = _on(_mesh([device]), [jax.ShapeDtypeStruct(*each) for each in shapes])
    elements = chunk and chunk * vocab

    def total(*arrays: jax.Array) -> jax.Array:
        return token_nll(*arrays, chunk_elements=elements).sum()

    mesh = _mesh([device]).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):  # by which the kernel knows the platform
        compiled = jax.jit(jax.value_and_grad(total)).lower(*arguments).compile()
        size = chosen_chunks(tokens, (vocab, width), jnp.bfloat16, elements).size
    return record(compiled, turns=math.ceil(tokens / size))


def compile_attention(
    run: Callable[..., Array],
    devices: Sequence[Any],
    *,
    length: int,
    head_dim: int,
    heads: int = 8,
    dtype: str = "bfloat16",
    **options: Any,
) -> Record:
    """The record of attention and its gradients, of one packed row on every device, four heads for a key.

    Args:
        run: ``run(query, key, value, pattern, scale=, …)``, for TPUs.
        devices: from :func:`hylorada_jax.planning.programs.topology_devices`.
        length: tokens of a row.
        head_dim: numbers of a head.
        heads: of the queries.
        dtype: of queries, keys and values.
        **options: handed on; arrays have gradients too.
    """
    mesh = _mesh(devices)
    arrays = {name: option for name, option in options.items() if isinstance(option, jax.ShapeDtypeStruct)}
    rest = {name: option for name, option in options.items() if name not in arrays}
    tensors = [
        jax.ShapeDtypeStruct((len(devices), length, n, head_dim), dtype) for n in (heads, *[heads // 4] * 2)
    ]

    def gradients(tensors: Any, arrays: Any, segment_ids: Array, g: Array) -> Any:
        def attended(tensors: Any, arrays: Any) -> Array:
            pattern = Pattern.of_rows(segment_ids, segment_ids=segment_ids)
            return run(*tensors, pattern, scale=head_dim**-0.5, **arrays, **rest)

        out, pull = jax.vjp(attended, tensors, arrays)
        return out, pull(g)

    segments = jax.ShapeDtypeStruct((len(devices), length), jnp.int32)
    shapes = _on(mesh, tensors, "data"), _on(mesh, arrays), *_on(mesh, (segments, tensors[0]), "data")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return record(jax.jit(gradients).lower(*shapes).compile())


def to_lora(figures: Mapping[str, float], lora: Mapping[str, float]) -> Record:
    """How many times lora's figures a method's are; small programs have no temporary memory to compare."""
    return {name: round(figures[name] / lora[name], 3) for name in COMPARED if lora[name]}


def _mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh that divides rows alone."""
    return Mesh(np.array(devices), ("data",))


def _on(mesh: Mesh, tree: Any, *axes: str) -> Any:
    """The shapes of a tree's leaves, divided over the axes of a mesh: over none, every device has them."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def record(compiled: jax.stages.Compiled, turns: float | None = None) -> Record:
    """The compiler's figures of a program, in which the loop over the loss's chunks has so many turns."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    cost = program_cost(text, turns)
    return {
        "flops": cost.flops,
        "bytes_accessed": cost.bytes_accessed,
        "uncopied_bytes": cost.bytes_accessed - cost.copied_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }
