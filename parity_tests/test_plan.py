"""Steps on meshes of TPUs that are not there: they compile, fit, and gather a layer's weights at a time.

Oracle: what each array may be by the rules of placement; lengths that no two axes share tell arrays apart.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from hylorada_jax.cli.main import main
from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.planning.libtpu import libtpu_directory

VOCAB, WIDTH, MLP, LAYERS, HEADS = 640, 512, 256, 3, 4
SHAPE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
MESH = "fsdp=2,tensor=2"
SEQ_LEN = 1024

# Two methods on four chips: what the compiler says, and what they move, by (kind, shapes).
PROGRAM = """
import json, sys
from hylorada_jax.planning.libtpu import use_libtpu
use_libtpu()
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.placement.placement import Placement
from hylorada_jax.planning.collectives import collectives, sent_bytes
from hylorada_jax.planning.plan import argument_bytes
from hylorada_jax.planning.programs import (
    base_of_shapes, compiled_step, mesh_of_devices, model_of_shapes, topology_devices
)
from hylorada_jax.training.config import TrainingConfig

shape, mesh, seq_len = json.loads(sys.argv[1])
devices = topology_devices("v5e:2x2")
base, found = base_of_shapes(DecoderConfig.from_hf(shape)), {}
training = TrainingConfig(output="none", batch_size=2, seq_len=seq_len, remat="full")
for method in ("lora", "hylorada"):
    adapter = HyLoRADAConfig(method=method)
    placement = Placement(mesh_of_devices(devices, mesh))
    step = compiled_step(model_of_shapes(base, adapter), placement, training)
    moved = collectives(step.as_text(), turns=1)
    memory = step.memory_analysis()
    found[method] = {
        "moved": [(each.kind, each.shapes) for each in moved], "sent": sum(sent_bytes(moved).values()),
        "arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes,
        "counted": argument_bytes(base, adapter, mesh, 4),
    }
print(json.dumps(found))
"""


def require_libtpu():
    try:
        libtpu_directory()
    except HyLoRADAError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def found():
    require_libtpu()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([SHAPE, MESH, SEQ_LEN])],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


pytestmark = pytest.mark.apart


@pytest.mark.parametrize("method", ["lora", "hylorada"])
def test_a_chip_gets_a_layers_weights_and_only_those_of_its_heads(method, found):
    gathered = [shape for kind, shapes in found[method]["moved"] if kind == "all-gather" for shape in shapes]
    sizes = [math.prod(shape) for shape in gathered]
    # Of q, o and the head; of all layers, or of both of tensor's shares, they would be twice as much or more.
    assert max(sizes) == max(WIDTH * WIDTH, VOCAB * WIDTH) // 2
    assert sizes.count(WIDTH * WIDTH // 2) >= 4  # q and o, forward and backward
    assert not [shape for shape in gathered if VOCAB in shape]  # no logits


@pytest.mark.parametrize("method", ["lora", "hylorada"])
def test_arguments_are_known_before_the_compiler_counts_them(method, found):
    counted, batch = found[method]["counted"], 3 * SEQ_LEN * 4
    # A step is not given what it does not read, and a TPU pads small arrays to whole tiles.
    assert 0.999 * (counted + batch) < found[method]["arguments"] < 1.2 * (counted + batch)


def test_a_conditioned_update_takes_hardly_more_than_a_plain_one(found):
    # Of a model this small what is summed over chips for each layer counts; of 8B it is no more than LoRA's.
    assert found["hylorada"]["sent"] < 1.06 * found["lora"]["sent"]


def test_a_plan_is_printed_with_its_command(tmp_path, monkeypatch, capsys):
    require_libtpu()
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    options = f"--topology v5e:2x2 --mesh {MESH} --method lora --seq-len {SEQ_LEN} --remat full --json"
    monkeypatch.setattr(sys, "argv", ["hylorada", "plan", "--model", str(tmp_path), *options.split()])
    main()
    record = json.loads(capsys.readouterr().out)
    (row,) = record["rows"]
    assert row["batch_size"] == 2
    assert row["fits"]
    assert row["tokens_per_second"] > 0
    # Two operations per token and weight forward, two again, two backward; of half the heads' and MLP's.
    layer = 2 * WIDTH**2 * (1 + 1 / 2) + 3 * WIDTH * MLP
    assert row["flops"] > 6 * SEQ_LEN * LAYERS * layer / 2
    assert f"--mesh {MESH} --remat full --batch-size 2 --seq-len {SEQ_LEN}" in record["best"]
