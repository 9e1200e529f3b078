"""The real SmolLM2-135M, adapted and fine-tuned on real text, in JAX and by the reference in float64.

python -m parity_tests.smollm2 --output benchmarks/results
"""

import itertools
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from matplotlib.figure import Figure

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.io.files import refuse_unusable, write_figure, write_json
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.training.config import TrainingConfig
from parity_tests.environment import environment
from parity_tests.families import all_in_float64, measuring
from parity_tests.models import Pair, errors, random_adapters
from parity_tests.trajectories import train_jax, train_torch

NAME = "smollm2-135m"
# All on, but the embeddings (28 million parameters more, of which so short a text names few) and shifted
# sparse attention, whose groups in rows this short cut off what the model attends to: its loss would start
# at 9.
CONFIG = HyLoRADAConfig(
    method="hylorada",
    lora_plus_enabled=True,
    sparse_enabled=True,
    sparse_adapter_dim=16,
    sparse_topk_ratio=0.5,
    train_norms=True,
)
TRAINING = TrainingConfig(output="unused", steps=20, warmup_ratio=0.1)
# Rows of text in a batch, tokens in a row, and batches, which are gone through again and again.
ROWS, LENGTH, BATCHES = 2, 32, 5
# Of the adapters whose gradients are compared: none is fresh, and the model is one of language still.
SPREAD = 0.01
ORACLE = "torch float64"
# In float64, the bounds of the small models (1e-13 was seen, and after the run 1e-12). In float32 there is
# the rounding of thirty layers (2.5e-6; 7e-5 in the gradients of gates, sums of terms that cancel), and AdamW
# turns the rounding of a gradient that all but vanishes into steps: a loss may move in its fifth digit
# (1.2e-5), and an adapter by one step of the fastest group (5e-4).
BOUNDS = {
    "float64": {"forward": 1e-10, "gradient": 1e-10, "losses": 1e-8, "adapters": 1e-8},
    "float32": {"forward": 1e-5, "gradient": 3e-4, "losses": 1e-4, "adapters": 2e-3},
}


def measure(dtypes: tuple[str, ...] = ("float64", "float32"), count: int = TRAINING.steps) -> dict[str, Any]:
    """What is recorded, JSON-able.

    Args:
        dtypes: of JAX's computation; the oracle's is float64 always.
        count: optimizer steps.

    Returns:
        "losses" of the steps from fresh adapters, by who computed them; and "errors" by dtype: "forward"
        (logits, loss) and "gradient" (all adapters) of a model with random adapters, relative; the largest
        of the "losses" and of the "adapters" after the steps, absolute.
    """
    batches = text_batches()
    steps = list(itertools.islice(itertools.cycle(batches), count))
    with all_in_float64():
        reference = hylorada_torch.HyLoRADAModel(torch_smollm2(), CONFIG)
    # float32 numbers, which all sides can hold.
    fresh, moved = (
        {name: value.astype(np.float32) for name, value in random_adapters(reference, spread).items()}
        for spread in (0.0, SPREAD)
    )
    expected: dict[str, np.ndarray] | None = None
    trained: dict[str, np.ndarray] = {}
    losses: dict[str, list[float]] = {}
    found: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        with measuring(dtype):
            pair = Pair(reference, HyLoRADAModel(load_model(NAME, dtype=dtype), CONFIG), batches[0])
            pair.load(moved)
            expected = expected or pair.expected()
            found[dtype] = errors(pair.got(), expected)
            pair.load(fresh)
            if ORACLE not in losses:
                losses[ORACLE], trained = train_torch(pair, TRAINING, steps)
            losses[f"jax {dtype}"], adapters = train_jax(pair, TRAINING, steps)
        found[dtype]["losses"] = float(np.abs(np.subtract(losses[f"jax {dtype}"], losses[ORACLE])).max())
        found[dtype]["adapters"] = max(
            float(np.abs(adapters[name] - trained[name]).max()) for name in trained
        )
    return {"errors": found, "losses": losses}


def torch_smollm2() -> torch.nn.Module:
    """The packaged model as transformers reads it, in float64; to be called within `all_in_float64`."""
    path = find_source(NAME).path
    options = {"gguf_file": path.name, "dtype": torch.float64}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5  # transformers reads 9.99999975e-06, which is 1e-5 in float32
    return model


def text_batches() -> list[dict[str, np.ndarray]]:
    """The beginning of the embedded corpus, in tokens."""
    text = "".join(
        document.text for document in itertools.islice(load_documents("python-stdlib", form="text"), 10)
    )
    count = BATCHES * ROWS * (LENGTH + 1)
    tokens = np.array(load_tokenizer(NAME).encode(text)[:count], np.int32)
    rows = tokens.reshape(BATCHES, ROWS, LENGTH + 1)
    return [{"input_ids": batch[:, :-1], "labels": batch[:, 1:]} for batch in rows]


def plot(losses: Mapping[str, list[float]], path: Path) -> None:
    """Draws the loss curves over each other, and below how far each is from the oracle's.

    Args:
        losses: as `measure` gives them.
        path: the PNG to write.
    """
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    oracle = np.array(losses[ORACLE])
    steps = range(1, len(oracle) + 1)
    above.plot(steps, oracle, color="black", linewidth=6, alpha=0.25, label=f"{ORACLE}, the reference")
    for color, name in zip(("tab:blue", "tab:orange"), sorted(losses.keys() - {ORACLE}), strict=False):
        above.plot(steps, losses[name], color=color, linewidth=1.5, linestyle="--", label=name)
        # A difference of nothing has no place on a logarithmic axis.
        difference = np.maximum(np.abs(np.array(losses[name]) - oracle), 1e-17)
        below.plot(steps, difference, color=color, marker="o", markersize=3, linewidth=1, label=name)
    above.set(
        ylabel="loss (nats per token)", title=f"{NAME}, method {CONFIG.method}: fine-tuning on real text"
    )
    below.set(
        xlabel="optimizer step",
        ylabel="difference from the reference",
        yscale="log",
        xticks=[1, 5, 10, 15, 20],
    )
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(path, figure)


def main(*, output: Path, dtypes: tuple[str, ...] = ("float64", "float32")) -> None:
    """Measures, and writes parity-smollm2-<device>.json and .png.

    Args:
        output: the directory for them.
        dtypes: of JAX's computation, for a device without float64.
    """
    refuse_unusable(output)
    started, about = time.perf_counter(), environment()
    measured = measure(dtypes)
    device = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower())
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python -m parity_tests.smollm2 --output {output}",
        **about,
        "seconds": round(time.perf_counter() - started, 1),
        "model": NAME,
        "text": f"{BATCHES} batches of {ROWS} rows of {LENGTH} tokens, the beginning of python-stdlib",
        "config": CONFIG.to_dict(),
        "bounds": BOUNDS,
        **measured,
    }
    path = output / f"parity-smollm2-{device}.json"
    write_json(path, record)
    plot(measured["losses"], path.with_suffix(".png"))
    for dtype, found in measured["errors"].items():
        print(
            dtype,
            *(f"{name} {error:.1e} (at most {BOUNDS[dtype][name]:.0e})" for name, error in found.items()),
        )
    print(path)


if __name__ == "__main__":
    tyro.cli(main)
