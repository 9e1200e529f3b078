"""The training step of a model without weights, compiled for devices that need not be there."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.packing import Rows
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math.loss import chosen_chunks
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.batch import computed
from hylorada_jax.models.causal_lm import CausalLM, param_shapes
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.placed import fitted
from hylorada_jax.models.quantize import shapes_kept
from hylorada_jax.placement.axes import AXES, mesh_sizes
from hylorada_jax.placement.placement import AUTO, Placement
from hylorada_jax.placement.shards import over_rows
from hylorada_jax.planning.cases import Case, Figures
from hylorada_jax.planning.chips import parse_topology
from hylorada_jax.planning.collectives import collectives, sent_bytes
from hylorada_jax.planning.hlo_cost import program_cost
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.memory import beside_step, needed_bytes
from hylorada_jax.training.optimizer import make_optimizer
from hylorada_jax.training.step import init_state, make_train_step
from hylorada_jax.trees import is_quantized

# What a TPU's compiler says of temporaries; arguments come to them.
_LACKS = re.compile(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def base_of_shapes(config: DecoderConfig, base_dtype: str | None = None) -> CausalLM:
    """One of our decoders in bfloat16, its linear layers perhaps in int8 or nf4, without weights."""
    params = shapes_kept(param_shapes(config, jnp.bfloat16), base_dtype)
    return CausalLM(DecoderLM(config), params, config, "shapes")


def model_of_shapes(base: CausalLM, adapter: HyLoRADAConfig) -> HyLoRADAModel:
    """An adapted model whose trees are shapes: it takes no weights and no memory.

    Args:
        base: without weights.
        adapter: what is adapted.
    """
    models = []

    def build(params: dict[str, Any]) -> tuple[Any, Any]:
        models.append(HyLoRADAModel(base.with_params(params), adapter))
        return models[0].adapters, models[0].frozen

    adapters, frozen = jax.eval_shape(build, base.params)
    (model,) = models
    # What it was built with were tracers.
    model.base, model.adapters, model.frozen = base, adapters, frozen
    return model


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a topology such as v5e:2x2; compiling for them is all that they can do.

    Raises:
        ConfigError: the compiler knows no such topology.
    """
    try:
        # A host has four chips by default; a single one is a host's only one.
        hosts = {"chips_per_host_bounds": (1, 1, 1)} if parse_topology(name)[1] == 1 else {}
        return get_topology_desc(platform="tpu", topology_name=name, **hosts).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            "A topology must be one that the TPU's compiler knows.",
            f"{name}: {error}",
            "Choose one that can be rented, such as v5e:2x4, v5e:4x4 or v5p:2x2x4.",
        ) from error


def mesh_of_devices(devices: Sequence[Any], mesh: str = "") -> Mesh:
    """A mesh of these devices in their order, of the sizes that a text describes.

    :func:`hylorada_jax.placement.placement.parse_mesh` orders those of a TPU by their links. A plan counts
    what they send each other by the sizes of the groups, which are the same.
    """
    sizes = mesh_sizes(mesh, len(devices))
    return Mesh(np.array(devices).reshape([sizes[axis] for axis in AXES]), AXES, axis_types=AUTO)


def step_arguments(
    model: HyLoRADAModel, placement: Placement, training: TrainingConfig, optimizer: Any
) -> tuple[Any, Any, Any]:
    """The shapes of a step's state, frozen tree and batch, where a placement puts them."""
    state = jax.eval_shape(lambda adapters: init_state(adapters, optimizer), model.adapters)
    ids = np.zeros(training.seq_len + 1, np.int32)
    document = TokenizedDocument(ids, structure_ids=ids if model.has_encoder else None)
    (row,) = Rows([document], training.seq_len)
    own = over_rows(placement.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((training.batch_size, *x.shape), x.dtype, sharding=own)
        for name, x in computed(row).items()
    }
    return placement.shapes(state), placement.shapes(model.frozen), batch


def compiled_step(
    model: HyLoRADAModel, placement: Placement, training: TrainingConfig
) -> jax.stages.Compiled:
    """The step that would train a model, compiled.

    Args:
        model: of :func:`model_of_shapes`.
        placement: on a mesh of devices that are here, or of a topology of jax.experimental.topologies.
        training: rows, remat and microbatches are read.
    """
    placement = fitted(placement, model.base)
    optimizer = make_optimizer(model.adapters, training, model.config)
    step = make_train_step(model.with_remat(training.remat), optimizer, training, placement.rules)
    arguments = step_arguments(model, placement, training, optimizer)
    # Not jax.set_mesh: a mesh of devices is given constants to hold, which those of a topology cannot.
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        return step.lower(*arguments).compile()


def loss_chunk(config: DecoderConfig, tokens: int, mesh: Mesh, *, quantized: bool = False) -> int:
    """How many scored tokens the loss of a step in bfloat16 takes in one turn of its loop.

    Args:
        config: of the base model.
        tokens: of a microbatch on one device.
        mesh: that the step is compiled for.
        quantized: the head is in codes.
    """
    head = config.vocab_size, config.hidden_size
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # by which the loss knows the platform
        return chosen_chunks(tokens, head, jnp.bfloat16, quantized=quantized).size


def figures_of(
    base: CausalLM, adapter: HyLoRADAConfig, seq_len: int, devices: Sequence[Any], case: Case
) -> Figures:
    """What the compiler says of the step in one case.

    Args:
        base: without weights.
        adapter: what is trained.
        seq_len: tokens of a row.
        devices: all of a mesh.
        case: how it is trained.
    """
    placement = Placement(mesh_of_devices(devices, case.mesh))
    rows = case.rows * placement.rows * case.microbatches
    training = TrainingConfig(
        output="none", batch_size=rows, microbatches=case.microbatches, seq_len=seq_len, remat=case.remat
    )
    start = time.perf_counter()
    try:
        model = model_of_shapes(base, adapter)
        compiled = compiled_step(model, placement, training)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = Figures(case, rows, refused=True, compile_seconds=time.perf_counter() - start)
        if (said := _LACKS.search(str(error))) is None:
            return refused
        temporary, limit = (round(float(said[n]) * _UNITS[said[n + 1]]) for n in (1, 3))
        return dataclasses.replace(refused, temp_bytes=temporary, limit_bytes=limit)
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    found = Figures(
        case,
        rows,
        needed_bytes=beside_step(model, placement) + needed_bytes(compiled),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        compile_seconds=seconds,
    )
    text, tokens = compiled.as_text(), case.rows * seq_len
    quantized = is_quantized(base.head({"params": base.params}))
    turns = math.ceil(tokens / loss_chunk(base.config, tokens, placement.mesh, quantized=quantized))
    try:
        cost, sent = program_cost(text or "", turns), sent_bytes(collectives(text or "", turns))
    except DataError:  # a program that is written in another way than a TPU's
        return found
    return dataclasses.replace(found, flops=cost.flops, bytes_accessed=cost.bytes_accessed, sent_bytes=sent)
