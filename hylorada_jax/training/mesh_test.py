"""Oracle of a step on eight devices: the step on one, in float64. And what its program may gather.

The devices are a CPU's, in one process beside this one, which measures; the tests judge what it found.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import tempfile
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.packing import Rows, batches
from hylorada_jax.errors import ConfigError
from hylorada_jax.math.loss import token_nll
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.batch import computed
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.placement.placement import AUTO, Placement, parse_mesh
from hylorada_jax.placement.shards import in_use, shard_rows
from hylorada_jax.training.checks import check_training
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer
from hylorada_jax.training.report import MetricsLog
from hylorada_jax.training.step import init_state, make_train_step
from hylorada_jax.training.trainer import HyLoRADATrainer

# Lengths that no two axes share. Two key-value heads, which a tensor of 4 does not divide.
SHAPE: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
# With experts, whose widths are those of the MLP above, and such an MLP in the first layer.
EXPERTS = SHAPE | {
    "model_type": "qwen3_moe", "moe_intermediate_size": 48, "num_experts": 5, "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}  # fmt: skip
OF_EXPERTS, OVER_EXPERTS = "hylorada_v1 of experts", "fsdp=4,tensor=2"
# Methods that have every adapter between them, where the mesh has all axes; and every other mesh.
EVERYWHERE = "fsdp=2,tensor=2"
CASES = [
    *((method, EVERYWHERE) for method in ("hylorada", "hylorada_v2", "longlora")),
    *(("dora", mesh) for mesh in ("data=8", "fsdp=8")),
    ("hylorada", "fsdp=2,tensor=4"),
    (OF_EXPERTS, OVER_EXPERTS),
]
TRAINING = TrainingConfig(
    output="run", steps=10, batch_size=16, microbatches=2, seq_len=12, warmup_steps=0, learning_rate=1e-2
)
STEPS = 3


def model_of(method, placement=None):
    """A model whose adapters are away from their start, where B = 0 hides half of the gradients."""
    method, of_experts = method.removesuffix(" of experts"), method == OF_EXPERTS
    targets = ("k_proj", "up_proj", "down_proj") if of_experts else ("k_proj", "o_proj")
    config = HyLoRADAConfig(
        method=method, lora_rank=2, lora_dropout=0.2, s2_group_size=4, sparse_adapter_dim=8,
        # Cut along outputs, or not at all, and along inputs.
        target_modules=targets, sparse_enabled=True if method == "hylorada" else None,
    )  # fmt: skip
    decoder = DecoderConfig.from_hf(EXPERTS if of_experts else SHAPE)
    base = CausalLM.from_config(decoder, jax.random.key(0), dtype=jnp.float64, remat="full")
    model = HyLoRADAModel(base, config, placement=placement)
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape), model.adapters)
    model.adapters = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), noisy, model.adapters)
    return model


def documents(has_encoder=False):
    """Of many lengths."""
    rng = np.random.default_rng(2)
    ids = [rng.integers(0, SHAPE["vocab_size"], n, dtype=np.int32) for n in rng.integers(3, 20, 90)]
    return [TokenizedDocument(x, structure_ids=x % 8 if has_encoder else None) for x in ids]


class Run:
    """A method's training where its model lies, by a program that takes a state only as it lay at first."""

    def __init__(self, model):
        self.frozen = model.frozen
        rows = Rows(documents(model.has_encoder), TRAINING.seq_len)
        self.batches = [*batches(rows, TRAINING.batch_size)][:STEPS]
        optimizer = make_optimizer(model.adapters, TRAINING, model.config)
        self.state = init_state(model.adapters, optimizer, placement=model.placement)
        self.made_apart = [] if model.placement is None else moved(self.state, model.placement)
        with in_use(self.frozen):
            step = make_train_step(model, optimizer, TRAINING)
            self.compiled = step.lower(self.state, self.frozen, self._batch(0)).compile()

    def _batch(self, number):
        return shard_rows(computed(self.batches[number]))

    def steps(self, *numbers):
        losses = []
        for number in numbers:
            with in_use(self.frozen):
                self.state, metrics = self.compiled(self.state, self.frozen, self._batch(number))
            losses.append(metrics["loss"])
        return jax.tree.map(np.asarray, (losses, self.state))


def moved(tree, placement):
    """The leaves that do not lie where they belong."""
    placed = jax.tree.leaves_with_path(placement.shardings(tree))
    pairs = zip(placed, jax.tree.leaves(tree), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, place), x in pairs
        if not x.sharding.is_equivalent_to(place, x.ndim)
    ]


def gathered(program):
    """The shapes of what a program's collectives gather, or move from device to device."""
    kinds = "all-gather|all-to-all|collective-permute"
    lines = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", program)
    return [
        [int(n) for n in shape.split(",") if n]
        for line in lines
        for shape in re.findall(r"\[([\d,]*)\]", line)
    ]


def furthest(ours, theirs):
    """How far apart two trees of numbers are."""
    return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True))


def trainer_on(count, output, *, memory=None, **settings):
    """A trainer on the first of the devices, on a mesh of one axis as a user may make it."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",), axis_types=AUTO[:1])
    model = model_of("lora", Placement(mesh))
    config = dataclasses.replace(TRAINING, output=output, steps=6, progress=False, **settings)
    return HyLoRADATrainer(model, documents(), None, config, memory=memory), model


def run_on(count, output, *, interrupted=None, **settings):
    """The adapters and the losses of a run on the first of the devices; None of one that is interrupted."""
    write = MetricsLog.write

    def interrupting(log, record):
        write(log, record)
        if record["step"] == interrupted:
            os.kill(os.getpid(), signal.SIGINT)

    with (
        mock.patch.object(MetricsLog, "write", interrupting),
        contextlib.redirect_stdout(sys.stderr),
        contextlib.suppress(KeyboardInterrupt),
    ):
        trainer, model = trainer_on(count, output, **settings)
        result = trainer.train()
        return jax.tree.map(np.asarray, (model.adapters, result.losses))


def refused(mesh, **changes):
    decoder = DecoderConfig.from_hf(SHAPE)
    base = CausalLM.from_config(decoder, jax.random.key(0))
    settings = {"output": "run", "batch_size": 16, "mesh": mesh} | changes
    try:
        check_training(base, TrainingConfig(**settings))
    except ConfigError as error:
        return str(error)
    return None


def loss_apart():
    """How far the loss by the kernel, and its gradients, are from what they are without; in float32."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6, 8), (40, 8)))
    targets = jnp.asarray(rng.integers(-10, 40, (4, 6)), jnp.int32)

    def both(kernel):
        return jax.value_and_grad(
            lambda hidden, head: token_nll(hidden, head, targets, kernel=kernel).sum(), (0, 1)
        )(hidden, head)

    with jax.set_mesh(parse_mesh(EVERYWHERE)):
        return furthest(
            *(jax.tree.map(np.asarray, jax.jit(both, static_argnums=0)(k)) for k in (True, False))
        )


def measure(directory):
    """What is found on eight devices, as JSON on stdout."""
    runs = {method: Run(model_of(method)) for method, _ in CASES}
    alone = {method: run.steps(*range(STEPS)) for method, run in runs.items()}
    found: dict[str, Any] = {"apart": [], "gathered": {}, "made_apart": []}
    for method, mesh in CASES:
        run = Run(model_of(method, Placement(parse_mesh(mesh))))
        found["gathered"].setdefault(mesh, []).extend(gathered(run.compiled.as_text()))
        found["made_apart"] += run.made_apart
        losses, _ = run.steps(0)
        more, state = run.steps(*range(1, STEPS))
        found["apart"].append(furthest(([*losses, *more], state), alone[method]))

    # Begun on eight devices, gone on with on four, and ended on one, for which what was chosen is too much.
    directory = tempfile.mkdtemp(dir=directory)  # of a process that hung, runs may be there
    begun, alone_in = f"{directory}/begun", f"{directory}/alone"
    auto: dict[str, Any] = {"microbatches": "auto", "resume": True}
    assert run_on(8, begun, interrupted=2) is None
    assert run_on(4, begun, interrupted=4, **auto) is None
    as_begun = trainer_on(1, begun, memory=10**12, **auto)[0].choice
    ended = run_on(1, begun, memory=as_begun.needed - 1, **auto)
    found["resumed"] = furthest(ended, run_on(1, alone_in, microbatches=16))
    # A row at a time, which eight devices cannot divide.
    found["chosen"] = [as_begun.setting.microbatches]
    found["chosen"] += [trainer_on(n, alone_in, **auto)[0].choice.setting.microbatches for n in (1, 8)]

    found["loss"] = loss_apart()
    found["refused"] = {
        "devices": refused("fsdp=3"),
        "data": refused("data=2,fsdp=2"),
        "heads": refused("tensor=8"),
        "rows": refused("fsdp=8", batch_size=12),
        "none": refused("fsdp=8"),
    }
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_on_devices):
    program = f"import sys\nfrom {__name__} import measure\nmeasure(sys.argv[1])"
    return json.loads(run_on_devices(8, program, tmp_path_factory.mktemp("mesh"), JAX_ENABLE_X64="1"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_steps_on_a_mesh_are_those_on_one_device(case, found):
    """Losses, adapters and both moments of all gradients, with microbatches, packing, remat and dropout."""
    assert found["apart"][case] < 1e-10


def test_the_moments_are_made_where_they_belong(found):
    """Whole on every device first, those of an embedding would take more than the step."""
    assert found["made_apart"] == []


def test_what_a_run_chose_when_it_began_is_chosen_again_where_it_can_be(found):
    assert found["chosen"] == [TRAINING.microbatches, 16, 1]


def test_the_kernel_of_the_loss_is_divided_over_a_mesh(found):
    # float32: 40 words in two parts of 20.
    assert found["loss"] < 1e-4


def test_a_run_goes_on_with_fewer_devices(found):
    """Losses of all steps, so of the same rows; and the adapters."""
    assert found["resumed"] < 1e-10


WIDTHS = (SHAPE["hidden_size"], SHAPE["intermediate_size"])


@pytest.mark.parametrize("mesh", ["fsdp=8", EVERYWHERE, OVER_EXPERTS])
def test_weights_are_gathered_a_layer_at_a_time(mesh, found):
    kernels = [shape for shape in found["gathered"][mesh] if len(shape) >= 2 and set(shape) & {*WIDTHS}]
    largest = max(math.prod(shape) for shape in kernels)
    of_a_layer = math.prod(WIDTHS) // (1 if mesh == "fsdp=8" else 2)
    of_a_layer *= EXPERTS["num_experts"] if mesh == OVER_EXPERTS else 1
    assert largest == of_a_layer


@pytest.mark.parametrize("mesh", [EVERYWHERE, "fsdp=2,tensor=4"])
def test_no_logits_are_gathered_over_the_vocabulary(mesh, found):
    assert not [shape for shape in found["gathered"][mesh] if SHAPE["vocab_size"] in shape]


def test_on_a_mesh_that_only_copies_nothing_is_gathered(found):
    assert found["gathered"]["data=8"] == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("devices", "'fsdp=3' on 8 devices"),
        ("data", "'data=2,fsdp=2' on 8 devices"),
        ("heads", "tensor=8, 4 heads"),
        ("rows", "12 / 1 = 12 rows, data=1,fsdp=8,tensor=1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(what, said, found):
    assert said in found["refused"][what]
    assert found["refused"]["none"] is None
