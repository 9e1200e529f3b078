"""Conversations beside TRL: preparing them, and a training step on them, measured side by side.

    python benchmarks/conversations.py --page docs/results.md

Conversations are made up of what Python's own library says of its functions. Both sides make the same tokens
of them, and score the same ones; in their steps they have the same weights, rows, adapted layers, rank,
optimizer and clipping, and their losses before the first update must agree. A round measures each contender
once, and each round begins with another one. Of a contender, conversations-<device>.json has:

    seconds, median_seconds     of the rounds
    paired_ratio                the median of its time to that of the first of its group, within each round,
                                on which slow phases of the machine tell less; of a step: per token
    conversations_per_second, tokens_per_second     medians; padding is no token, and what both predict alone
                                counts on both sides
    peak_resident_bytes, result_bytes   of the first preparation: see benchmarks/contenders/chats.py
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import in_own_process, load_per_core, run, started, write_record
from benchmarks.experiment import INSTALL
from benchmarks.report import check_page, device, fill_page, markdown
from benchmarks.step_time import AGREEMENT, cores, paired_ratio, rotated, time_steps
from hylorada_jax.errors import HyLoRADAError, require_packages
from hylorada_jax.io.files import refuse_unusable
from hylorada_jax.terminal import show

if TYPE_CHECKING:
    from benchmarks.contenders.chats import Row
    from benchmarks.contenders.setting import Contender, Setting

PACKAGES = ("trl", "datasets", "peft", "transformers", "torch")


def main(
    *,
    output: Path = Path("runs"),
    page: Path | None = None,
    model: str = "smollm2-135m",
    conversations: int = 10_000,
    batch_size: int = 2,
    seq_len: int = 256,
    rounds: int = 8,
    methods: tuple[str, ...] = ("lora", "dora"),
    threads: int | None = None,
) -> None:
    """Measure preparing chats and training on them beside TRL, and write conversations-<device>.json.

    Args:
        output: the directory that it is written to.
        page: a Markdown file whose table is replaced.
        model: smollm2-135m (the packaged weights), or another whose chats are in ChatML.
        conversations: how many are prepared.
        batch_size: rows per step.
        seq_len: tokens per row.
        rounds: how often each contender is measured.
        methods: whose steps are measured, of lora and dora.
        threads: of torch; by default as many as the cores that JAX computes on.
    """
    refuse_unusable(output)
    require_packages(
        f"This benchmark needs the packages {', '.join(PACKAGES)}.", PACKAGES, f"Install them: {INSTALL}."
    )
    if conversations < 1:
        raise HyLoRADAError("conversations must be ≥ 1.", conversations, "Correct it.")
    check_page(page, "conversations")
    # Else JAX would take most of a GPU's memory at its start, which torch needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what it holds would compile in no time
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports every trainer that is made
    from benchmarks.contenders import roster
    from benchmarks.contenders.chats import DIFFERENCES, made_up, pieces
    from benchmarks.contenders.setting import WARMUP, Setting, describe
    from parity_tests.environment import environment

    setting = Setting(model, batch_size, seq_len, "float32", WARMUP + rounds, threads or cores())
    roster.check([name for method in methods for name in (method, f"peft {method}")], setting, rounds)
    about, of, before = environment(), pieces(), load_per_core()
    versions = about["versions"] | {name: importlib.metadata.version(name) for name in PACKAGES}  # type: ignore[operator]
    record = {
        "command": started(),
        "environment": about | {"versions": versions},
        "settings": describe(setting)
        | {"tokens": "made-up conversations", "conversations": conversations}
        | {"rounds": rounds, "cores": cores()},
        "differences": list(DIFFERENCES),
        "preparation": measure_preparation(model, seq_len, of, conversations, rounds),
        "step": measure_steps(setting, methods, made_up(of, 16 * batch_size), rounds),
        # Of other work too: threads that wait for one another then lose more than those that do not.
        "load_per_core": [before, load_per_core()],
    }
    path = write_record(output, "conversations", record)
    show(text := table(record))
    fill_page(page, "conversations", text)
    print(path)


def measure_preparation(
    model: str, seq_len: int, of: Sequence[tuple[str, str]], count: int, rounds: int
) -> dict[str, Any]:
    """The tokens of made-up conversations, and which of them count, by each side.

    Args:
        model: whose tokenizer it is.
        seq_len: tokens to which a conversation is cut.
        of: what conversations are made up of.
        count: of conversations.
        rounds: how often each contender is measured.

    Returns:
        What is recorded, by contender.

    Raises:
        HyLoRADAError: the sides do not come to the same tokens.
    """
    from tqdm import tqdm

    from benchmarks.contenders.chats import PREPARATIONS, timed_preparation

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PREPARATIONS}
    for number in tqdm(range(rounds), desc="preparing", unit="round", leave=False):
        for name in rotated(list(found), number):
            found[name].append(in_own_process(timed_preparation, name, model, seq_len, of, count))
        same_tokens({name: measured[-1] for name, measured in found.items()})
    seconds = {name: [one["seconds"] for one in measured] for name, measured in found.items()}
    return {
        name: {
            **summary(seconds[name], seconds["ours"]),
            "conversations_per_second": statistics.median(count / took for took in seconds[name]),
            **{
                key: found[name][0][key]
                for key in ("tokens", "scored", "peak_resident_bytes", "result_bytes")
            },
        }
        for name in found
    }


def same_tokens(measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses sides that do not make the same tokens of conversations, or score others.

    Raises:
        HyLoRADAError: they do not; all are named.
    """
    if len({one["digest"] for one in measured.values()}) > 1:
        raise HyLoRADAError(
            "All contenders come to the same tokens, and score the same ones.",
            ", ".join(
                f"{name} {one['tokens']:,}, scored {one['scored']:,}" for name, one in measured.items()
            ),
            "Find which one has another template or mask; times of two things tell nothing.",
        )


def measure_steps(
    setting: Setting, methods: Sequence[str], rows: Sequence[Row], rounds: int
) -> dict[str, Any]:
    """A training step on conversations, by each side: one to a row and packed.

    Args:
        setting: what all have in common.
        methods: of lora and dora.
        rows: the conversations, of which the first that fit into a batch are taken.
        rounds: timed steps of each contender.

    Returns:
        What is recorded, by contender.

    Raises:
        HyLoRADAError: the first losses of a group do not agree.
    """
    from benchmarks.contenders import in_jax, in_trl
    from benchmarks.contenders.chats import fitting, our_batches

    chosen, base = fitting(rows, setting), in_jax.load_base(setting)

    def ours(method: str, packing: bool) -> tuple[Contender, list[int]]:
        batches, tokens = our_batches(chosen, setting, packing=packing)
        return in_jax.ours(method, setting, batches, base), tokens

    measured: dict[str, Any] = {}
    for method in methods:
        theirs = functools.partial(in_trl.sft, method == "dora", setting, chosen)
        padded = {
            method: functools.partial(ours, method, False),
            f"trl {method}": functools.partial(theirs, pad_to_multiple_of=setting.seq_len),
            f"trl {method}, padded to the longest": theirs,
        }
        packed = {
            f"{method}, packed": functools.partial(ours, method, True),
            f"trl {method}, packed": functools.partial(theirs, packing=True),
        }
        for group in (padded, packed):
            measured |= _measure_group({name: make() for name, make in group.items()}, setting, rounds)
    return measured


def _measure_group(
    made: Mapping[str, tuple[Contender, list[int]]], setting: Setting, rounds: int
) -> dict[str, Any]:
    """What is recorded of contenders that start with the same conversations."""
    from benchmarks.contenders.setting import WARMUP, precision

    with precision(setting):
        contenders = {name: contender for name, (contender, _) in made.items()}
        found = time_steps(contenders, rounds, AGREEMENT[setting.dtype])
    per_token = {}
    for name, (_, tokens) in made.items():
        each = [tokens[(WARMUP + number) % len(tokens)] for number in range(rounds)]
        per_token[name] = [took / n for took, n in zip(found[name]["seconds"], each, strict=True)]
    first = next(iter(per_token.values()))
    return {
        name: {
            **summary(one["seconds"], one["seconds"]),
            "paired_ratio": summary(per_token[name], first)["paired_ratio"],
            "tokens_per_second": statistics.median(1 / took for took in per_token[name]),
            "tokens": made[name][1],
            **one,
        }
        for name, one in found.items()
    }


def summary(seconds: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """The times of the rounds, their median, and the median ratio to those of the group's first contender.

    Example:
        >>> summary([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["paired_ratio"]
        2.0
    """
    return {
        "seconds": list(seconds),
        "median_seconds": statistics.median(seconds),
        "paired_ratio": paired_ratio(seconds, first),
    }


def table(record: Mapping[str, Any]) -> str:
    """The results as Markdown, with what they were measured on."""
    settings, about = record["settings"], record["environment"]
    prepared = [["preparing", "conversations/s", "time, to ours", "memory beside the result, MB"]]
    for name, one in record["preparation"].items():
        peak, result = one["peak_resident_bytes"], one["result_bytes"]
        memory = "" if peak is None else f"{(peak - result) / 1e6:,.0f}"
        speed = f"{one['conversations_per_second']:,.0f}"
        prepared.append([name, speed, f"{one['paired_ratio']:.2f}", memory])
    steps = [["step", "tokens/s", "time per token, to ours"]]
    for name, one in record["step"].items():
        steps.append([name, f"{one['tokens_per_second']:,.0f}", f"{one['paired_ratio']:.2f}"])
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("jax", "torch", *PACKAGES[:4]))
    tokens, load = record["preparation"]["ours"]["tokens"], record["load_per_core"]
    return (
        f"{markdown(prepared)}\n\n{markdown(steps)}\n\n"
        f"{settings['model']}; {settings['conversations']:,} conversations of {tokens:,} tokens; "
        f"steps of {settings['batch_size']} × {settings['seq_len']}, {settings['dtype']}, "
        f"rank {settings['rank']} on q, k, v, o. Medians of {settings['rounds']} rounds, ratios within each, "
        f"on {settings['cores']} cores of {device(about)}, at a load of {min(load):.1f} to {max(load):.1f} "
        f"per core; {versions}. Commit {about['commit']}.\n"
    )


if __name__ == "__main__":
    run(main)
