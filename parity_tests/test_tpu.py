"""Every layer and every method's training step compiles for a TPU. None is needed, but its compiler is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_compile import SMALL, SMALL_LONG, TOPOLOGIES
from hylorada_jax.config import METHODS
from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.planning.libtpu import libtpu_directory
from parity_tests.layers import LAYERS
from parity_tests.test_plan import require_libtpu

ROOT = Path(__file__).parents[1]

# What does all that the other does, and more.
INCLUDES = {
    "dora": "lora",
    "lorada": "lora",
    "hylorada_v1": "lora",
    "hylorada_v2": "hylorada_v1",
    "hylorada": "hylorada_v1",
}


def compiled_by(command, output):
    """The record of a benchmark that needs TPUs' compiler."""
    require_libtpu()
    name, *options = command.split()
    # A process of its own: once libtpu can be imported, JAX looks for a TPU unless that is forbidden.
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options, "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (record,) = output.glob("*.json")
    return json.loads(record.read_text())


@pytest.mark.apart
def test_everything_compiles_for_v5e(tmp_path):
    record = compiled_by("tpu_compile --small --topologies v5e:2x2", tmp_path)
    (compiled,) = record["topologies"].values()
    layers, steps = compiled["layers"], compiled["steps"]
    assert compiled["device"] == "TPU v5 lite"
    assert set(layers) == set(LAYERS)
    assert set(steps) == set(METHODS)
    for figures in [*layers.values(), *steps.values()]:
        # A small program may need no memory beside its arguments and results.
        assert all(value > 0 for name, value in figures.items() if name not in ("temp_bytes", "to_lora"))

    for method, included in INCLUDES.items():
        assert steps[method]["flops"] > steps[included]["flops"]
    # Two operations per token and weight forward, two backward. Loops counted once would give less.
    assert steps["lora"]["flops"] > 4 * record["batch_size"] * record["seq_len"] * _weights(SMALL)
    # Each of four devices has a quarter of the rows; what is not divided is small beside them.
    on_all = compiled["steps_on_4_devices"]["hylorada"]
    assert on_all["flops"] < steps["hylorada"]["flops"] / 3
    # Of a long row no layer ever holds its logits, which are float32.
    logits = 4 * SMALL["num_attention_heads"] * SMALL_LONG**2
    assert compiled["long_step"]["temp_bytes"] < logits


@pytest.mark.apart
def test_a_long_row_needs_no_more_than_it_did(tmp_path):
    """Bounds a little above what is reached."""
    lora, v1 = compiled_by("tpu_compile --small --long-rows", tmp_path)["steps"].values()
    assert lora["temp_bytes"] < 510e6
    assert v1["to_lora"]["flops"] < 1.01
    assert v1["to_lora"]["uncopied_bytes"] < 1.06
    assert v1["to_lora"]["temp_bytes"] < 1.10


@pytest.mark.apart
def test_the_kernels_of_attention_compile_for_every_tpu(tmp_path):
    """On four chips, each with its own row: the compiler does not divide a kernel by itself."""
    sizes = "--lengths 512 --head-dims 80 --blocks 256 --chips 4"
    command = f"attention_blocks --topologies {' '.join(TOPOLOGIES)} {sizes}"
    records = compiled_by(command, tmp_path)["records"]
    assert len(records) == 3 * len(TOPOLOGIES)
    # Two products forward and seven backward, in three blocks of two by two, of eight heads.
    products = 9 * 3 * 8 * 2 * 256**2 * 80
    for record in records:
        assert products <= record["figures"]["flops"] < 1.01 * products


OLD_TPUS = """
from hylorada_jax.planning.libtpu import use_libtpu
use_libtpu()
import jax, jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from benchmarks.tpu_programs import compile_attention, compile_loss
from hylorada_jax.math.attention import attention

for topology in ("v3:2x2", "v4:2x2x1"):
    device = get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    compile_attention(attention, [device], length=256, head_dim=64)
    print(compile_loss(32_768, 256, None, device, tokens=2048)["flops"])
"""


@pytest.mark.apart
def test_old_tpus_get_no_kernel_that_they_do_not_take():
    """A v3 multiplies no bfloat16 in one, and a v4 has fast memory for few tokens of the loss's."""
    require_libtpu()
    run = subprocess.run([sys.executable, "-c", OLD_TPUS], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    # All turns of the loss are counted: two products with the head, and a few operations for every logit.
    products = 2 * 2 * 2048 * 32_768 * 256
    assert all(1 < float(flops) / products < 1.1 for flops in run.stdout.split())


# A step of a model with experts, and of one whose MLP is as wide as the experts that a token has.
MIXTURES = """
from hylorada_jax.planning.libtpu import use_libtpu
use_libtpu()
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.planning.cases import Case
from hylorada_jax.planning.programs import base_of_shapes, figures_of, topology_devices

shape = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
shape |= {"num_key_value_heads": 2, "head_dim": 128}
dense = shape | {"model_type": "qwen3", "intermediate_size": 512}
mixed = shape | {"model_type": "qwen3_moe", "moe_intermediate_size": 256, "num_experts_per_tok": 2}
for hf in (dense, mixed | {"num_experts": 64}):
    base, case = base_of_shapes(DecoderConfig.from_hf(hf)), Case("fsdp=2", "full", 1)
    figures = figures_of(base, HyLoRADAConfig(method="lora"), 512, topology_devices("v5e:2x2")[:2], case)
    print(figures.flops, figures.temp_bytes)
"""


@pytest.mark.apart
def test_a_mixture_costs_the_experts_that_tokens_have():
    require_libtpu()
    run = subprocess.run([sys.executable, "-c", MIXTURES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    dense, mixed = ([float(n) for n in line.split()] for line in run.stdout.splitlines())
    assert dense[0] < mixed[0] < 1.1 * dense[0]  # with a router of 64
    assert mixed[1] < 1.25 * dense[1]


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(HyLoRADAError, match=f"pip install --no-deps --target {tmp_path}/libtpu"):
        libtpu_directory()


def _weights(shape):
    """The weights that every token is multiplied with."""
    d, kv_share = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = 2 * d**2 * (1 + kv_share) + 3 * d * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer + shape["vocab_size"] * d
