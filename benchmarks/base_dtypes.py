"""What a base in int8 or nf4 costs: held-out perplexity before and after tuning, and a step's time.

    python benchmarks/base_dtypes.py --page docs/models.md

The main job, on each base from the same adapters and the same batches. A round takes a step on every base,
and each round begins with another one. Of a base, base-dtypes-<device>.json has:

    before, after           perplexity of the held-out text, before the first and after the last step
    losses                  of the steps, in nats per token
    seconds, median_seconds of the steps but the first, and their median
    paired_ratio            the median of the ratios to the first base's, within each round
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import run, started, write_record
from benchmarks.experiment import INSTALL
from benchmarks.report import check_page, device, fill_page, markdown
from benchmarks.step_time import paired_ratio, rotated
from hylorada_jax.errors import HyLoRADAError, require_packages
from hylorada_jax.io.files import refuse_unusable
from hylorada_jax.terminal import show

if TYPE_CHECKING:
    from hylorada_jax.config import HyLoRADAConfig
    from hylorada_jax.training.config import TrainingConfig

# What the linear layers are kept in; the first is what the others are compared with.
BASES = {"bfloat16": None, "int8": "int8", "nf4": "nf4"}


def main(
    *,
    output: Path = Path("runs"),
    page: Path | None = None,
    model: str = "smollm2-135m",
    steps: int = 40,
    batch_size: int = 4,
    seq_len: int = 256,
    eval_tokens: int = 8192,
) -> None:
    """Tune the same adapter on a base in bfloat16, int8 and nf4, and write base-dtypes-<device>.json.

    Args:
        output: the directory that it is written to.
        page: a Markdown file whose table is replaced.
        model: smollm2-135m (the packaged weights), or another that our decoder has.
        steps: optimizer steps.
        batch_size: rows per step.
        seq_len: tokens per row.
        eval_tokens: of the held-out text.
    """
    refuse_unusable(output)
    require_packages("Quantised bases need the package qwix.", ["qwix"], f"Install it: {INSTALL}.")
    if steps < 2:
        raise HyLoRADAError("steps must be ≥ 2: the first one warms up.", steps, "Give more.")
    check_page(page, "base-dtypes")
    from hylorada_jax.cli.adapter import DEFAULTS
    from hylorada_jax.training.config import TrainingConfig
    from parity_tests.environment import environment

    config = DEFAULTS.build()
    training = TrainingConfig(
        output=output, steps=steps, batch_size=batch_size, seq_len=seq_len, eval_tokens=eval_tokens
    )
    record = {
        "command": started(),
        "environment": environment(),
        "settings": {"model": model, "data": "python-stdlib", "method": config.method, "steps": steps}
        | {"batch_size": batch_size, "seq_len": seq_len, "eval_tokens": eval_tokens},
        "bases": measure(model, config, training),
    }
    path = write_record(output, "base-dtypes", record)
    show(text := table(record))
    fill_page(page, "base-dtypes", text)
    print(path)


def measure(model: str, config: HyLoRADAConfig, training: TrainingConfig) -> dict[str, Any]:
    """What is recorded of each base, by its name.

    Args:
        model: as for `load_model`.
        config: of the adapter.
        training: how it is trained.
    """
    import jax.numpy as jnp
    from tqdm import tqdm

    from hylorada_jax.data.corpus import PYTHON_STDLIB, load_documents
    from hylorada_jax.data.loading import mixed_batches
    from hylorada_jax.data.packing import Rows
    from hylorada_jax.data.tokenization import prepare, tokenize
    from hylorada_jax.evaluation.perplexity import PerplexityEvaluator
    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.batch import computed
    from hylorada_jax.models.loading import load_model
    from hylorada_jax.models.tokenizer import load_tokenizer
    from hylorada_jax.training.optimizer import make_optimizer
    from hylorada_jax.training.step import init_state, make_train_step

    tokenizer = load_tokenizer(model)
    train, _ = prepare(load_documents(PYTHON_STDLIB, "train"), tokenizer, training.seq_len)
    held_out = tokenize(load_documents(PYTHON_STDLIB, "eval"), tokenizer)
    batches = mixed_batches([(Rows(train, training.seq_len), 1)], training.batch_size, training.seed)

    found: dict[str, dict[str, Any]] = {}
    models, evaluators, programs, states = {}, {}, {}, {}
    for name, base_dtype in BASES.items():
        base = load_model(model, dtype=jnp.bfloat16, base_dtype=base_dtype)
        models[name] = HyLoRADAModel(base, config, training.seed)
        optimizer = make_optimizer(models[name].adapters, training, config)
        states[name] = init_state(models[name].adapters, optimizer, training.seed)
        programs[name] = make_train_step(models[name], optimizer, training)
        evaluators[name] = PerplexityEvaluator(
            models[name], held_out, seq_len=training.seq_len, stride=training.seq_len,
            batch_size=training.batch_size, max_tokens=training.eval_tokens,
        )  # fmt: skip
        found[name] = {
            "before": evaluators[name](models[name].adapters, progress=False).perplexity,
            "losses": [],
            "seconds": [],
        }
    for number in tqdm(range(training.steps), desc="tuning", unit="step", leave=False):
        batch = computed(next(batches))
        for name in rotated(list(BASES), number):
            began = time.perf_counter()
            states[name], metrics = programs[name](states[name], models[name].frozen, batch)
            found[name]["losses"].append(float(metrics["loss"]))
            found[name]["seconds"].append(time.perf_counter() - began)
    for name, one in found.items():
        one["after"] = evaluators[name](states[name].adapters, progress=False).perplexity
        del one["seconds"][0]  # it compiles
        one["median_seconds"] = statistics.median(one["seconds"])
        one["paired_ratio"] = paired_ratio(one["seconds"], next(iter(found.values()))["seconds"])
    return found


def table(record: Mapping[str, Any]) -> str:
    """The results as Markdown, with what they were measured on."""
    settings, about = record["settings"], record["environment"]
    rows = [["base", "perplexity before", "after", "step, to bfloat16's"]]
    for name, one in record["bases"].items():
        numbers = [f"{one['before']:.3f}", f"{one['after']:.3f}", f"{one['paired_ratio']:.2f}"]
        rows.append([name, *numbers])
    return (
        f"{markdown(rows)}\n\n"
        f"{settings['model']}, {settings['method']}; {settings['steps']} steps of {settings['batch_size']} × "
        f"{settings['seq_len']} tokens of {settings['data']}, computed in bfloat16; perplexity of "
        f"{settings['eval_tokens']:,} held-out tokens, of one seed; steps on {device(about)}. "
        f"Commit {about['commit']}.\n"
    )


if __name__ == "__main__":
    run(main)
