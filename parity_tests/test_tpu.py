"""Every layer and every method's training step compiles for a TPU. None is needed, but its compiler is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_compile import SMALL, SMALL_LONG, libtpu_directory
from hylorada_jax.config import METHODS
from hylorada_jax.errors import HyLoRADAError
from parity_tests.layers import LAYERS

# What does all that the other does, and more.
INCLUDES = {
    "dora": "lora",
    "lorada": "lora",
    "hylorada_v1": "lora",
    "hylorada_v2": "hylorada_v1",
    "hylorada": "hylorada_v1",
}


@pytest.mark.apart
def test_everything_compiles_for_v5e(tmp_path):
    try:
        libtpu_directory()
    except HyLoRADAError as missing:
        pytest.skip(str(missing))
    command = ["-m", "benchmarks.tpu_compile", "--small", "--topologies", "v5e:2x2", "--output"]
    # A process of its own: once libtpu can be imported, JAX looks for a TPU unless that is forbidden.
    run = subprocess.run(
        [sys.executable, *command, tmp_path], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "tpu-compile.json").read_text())
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
