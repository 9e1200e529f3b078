"""One training step of our methods, of peft on torch and of qwix: time and memory, measured side by side.

    python benchmarks/step_time.py

On a GPU, in the setting that NeMo publishes figures of, from random weights of the shape of Llama 3 8B:

    python -m benchmarks.random_model llama-3-8b --output runs/llama-3-8b
    python benchmarks/step_time.py --model runs/llama-3-8b --dtype bfloat16 --batch-size 2 --seq-len 4096 \\
        --rank 16 --alpha 32 --targets all --remat --peak-tflops 989 --no-memory \\
        --contenders lora dora hylorada "peft lora" "peft dora"

All contenders have the same weights, batch, adapted layers, rank, clipping and device, and their losses
before the first update must agree. A round runs a step of each, and each round begins with another one. Of a
contender, step-time-<tokens of a row>-<device>.json has:

    seconds, median_seconds, iqr_seconds    of the timed steps; a step ends when its loss is on the host
    ratio_to_lora           of the medians
    paired_ratio_to_lora    the median of the ratios within each round, on which slow phases of the machine
                            tell less
    cpu_seconds             of all cores together, without waiting for a core
    paired_cpu_ratio_to_lora    the same of these, on which other work on the machine tells less still
    tokens_per_second       of the median step
    model_tflops_per_second 4·N operations a token, N the base model's parameters: two forward, two for what
                            goes back; mfu is their part of --peak-tflops
    first_loss, last_loss   nats per token, before the first and before the last step
    trainable_parameters, compile_seconds
    program_bytes           of the compiled step: weights, state, batch, results and temporaries, as XLA says
    peak_resident_bytes     what a process with this contender alone holds in a step at most, without what it
                            held before it loaded the model (libraries_resident_bytes)
    peak_device_bytes       what was allocated on a GPU at most: by torch in a step, by JAX since its start
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Run by its path, Python looks for modules in this file's directory, not in the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import in_own_process, load_per_core, run, started, write_record
from benchmarks.report import check_page, device, fill_page, markdown
from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.io.files import refuse_unusable

if TYPE_CHECKING:
    from benchmarks.contenders.setting import Contender, Setting

NAMES = ("lora", "dora", "hylorada_v1", "hylorada", "peft lora", "peft dora", "qwix lora")
BASELINE = "lora"
# How far first losses may be apart, relative: they are those of one model, rounded in different orders.
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}


def main(
    *,
    output: Path = Path("runs"),
    page: Path | None = None,
    model: str = "smollm2-135m",
    batch_size: int = 2,
    seq_len: int = 256,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 12,
    contenders: tuple[str, ...] = NAMES,
    threads: int | None = None,
    memory: bool = True,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Literal["attention", "all"] = "attention",
    remat: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Time one training step of every contender, and write step-time-<tokens of a row>-<device>.json.

    Args:
        output: the directory that it is written to.
        page: a Markdown file whose table is replaced.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        batch_size: rows per step.
        seq_len: tokens per row.
        dtype: of the frozen weights and the computation.
        rounds: timed steps of each contender.
        contenders: which of them; "peft lora" and the like are one word each, in quotes.
        threads: of torch; by default as many as the cores that JAX computes on.
        memory: measure resident memory too, of each contender in a process of its own.
        rank: of the adapters.
        alpha: their α.
        targets: "attention" adapts q, k, v and o; "all" the MLP's three too.
        remat: of a layer keep its input alone for the backward pass, in ours and in PEFT's.
        peak_tflops: what the device can do at most, in this dtype; for the part of it that is used.
    """
    refuse_unusable(output)
    name = f"step-time-{seq_len}"
    check_page(page, name)
    # Else JAX would take most of a GPU's memory at its start, which torch needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what it holds would compile in no time
    from benchmarks.contenders import roster
    from benchmarks.contenders.setting import TARGETS, WARMUP, Setting
    from parity_tests.environment import environment

    own = rank, alpha, TARGETS[targets], remat
    setting = Setting(model, batch_size, seq_len, dtype, WARMUP + rounds, threads or cores(), *own)
    roster.check(contenders, setting, rounds)
    about = environment()
    record = {
        "command": started(),
        "environment": about | {"versions": about["versions"] | roster.versions(contenders)},  # type: ignore[operator]
        **measure(setting, contenders, rounds, memory=memory, peak_tflops=peak_tflops),
    }
    path = write_record(output, name, record)
    print(table(record["contenders"]))
    fill_page(page, name, ratios(record))
    print(path)


def cores() -> int:
    """The cores that this process may use, on which JAX computes where there is no accelerator."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(
    setting: Setting,
    names: Sequence[str],
    rounds: int,
    *,
    memory: bool,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Builds all contenders, checks that they compute the same loss, and times them.

    Args:
        setting: what all have in common.
        names: of the contenders.
        rounds: timed steps of each.
        memory: measure resident memory too, of each contender in a process of its own.
        peak_tflops: of the device.

    Returns:
        What is recorded, JSON-able: "settings", "differences" by nature, and "contenders" by name.

    Raises:
        HyLoRADAError: first losses do not agree, or JAX computes on a device that torch does not have.
        ModelError: the model is not found, or our decoder does not have its family.
    """
    from benchmarks.contenders import roster
    from benchmarks.contenders.setting import describe, precision

    # First: beside all of them, built to be timed, one alone may find too little memory.
    alone = {name: _memory(name, setting) for name in names} if memory else {}
    with precision(setting):
        found = time_steps(roster.build_all(names, setting), rounds, AGREEMENT[setting.dtype])
        settings = describe(setting)
    baseline = found.get(BASELINE)
    settings |= {"rounds": rounds, "cores": cores(), "first_losses_agree_to": AGREEMENT[setting.dtype]}
    settings["load_per_core"] = load_per_core()  # with our own
    return {
        "settings": settings,
        "differences": list(roster.DIFFERENCES),
        "contenders": {
            name: summary(one, baseline)
            | speed(setting, one["seconds"], peak_tflops)
            | one
            | alone.get(name, {})
            for name, one in found.items()
        },
    }


def time_steps(
    contenders: Mapping[str, Contender], rounds: int, agreement: float
) -> dict[str, dict[str, Any]]:
    """The measurements of each contender by name, "seconds" among them.

    Args:
        contenders: at the base model, by name.
        rounds: timed steps of each.
        agreement: how far the first losses may be apart, relative.

    Raises:
        HyLoRADAError: they are further apart, and so do not compute the same thing.
    """
    from tqdm import tqdm

    from benchmarks.contenders.setting import WARMUP

    first = {name: contender.step() for name, contender in contenders.items()}
    check_agreement(first, agreement)
    for contender in contenders.values():
        for _ in range(WARMUP - 1):
            contender.step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, float] = {}
    for number in tqdm(range(rounds), desc="timing", unit="round", leave=False):
        for name in rotated(list(contenders), number):
            took, of_cores, last[name] = contenders[name].timed()
            seconds[name].append(took)
            spent[name].append(of_cores)
    return {
        name: {
            "first_loss": first[name],
            "last_loss": last[name],
            "trainable_parameters": contender.trainable,
            "compile_seconds": contender.compile_seconds,
            "program_bytes": contender.program_bytes,
            "seconds": seconds[name],
            "cpu_seconds": spent[name],
        }
        for name, contender in contenders.items()
    }


def check_agreement(losses: Mapping[str, float], agreement: float) -> None:
    """Refuses first losses that are further apart than ``agreement`` times their median, or not finite.

    Raises:
        HyLoRADAError: they are; all are named.

    Example:
        >>> check_agreement({"lora": 2.0, "peft lora": 2.0001}, 1e-4)
    """
    middle = statistics.median(losses.values())
    if not all(abs(loss - middle) <= agreement * abs(middle) for loss in losses.values()):
        raise HyLoRADAError(
            f"All contenders start at the base model: their first losses agree to {agreement:g}.",
            ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()),
            "Find which one has other weights or another computation; times of two things tell nothing.",
        )


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round.

    Example:
        >>> rotated(["a", "b", "c"], 4)
        ['b', 'c', 'a']
    """
    at = number % len(names)
    return [*names[at:], *names[:at]]


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """The median of the ratios within each round, on which slow phases of the machine tell less.

    Example:
        >>> paired_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        2.0
    """
    return statistics.median(own / other for own, other in zip(seconds, baseline, strict=True))


def summary(
    times: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]] | None
) -> dict[str, float | None]:
    """Median, interquartile range, and the ratios to the baseline.

    Args:
        times: "seconds" and "cpu_seconds" of each round.
        baseline: the same of what the ratios are to; None where it was not measured.

    Example:
        >>> own, other = ({"seconds": x, "cpu_seconds": x} for x in ([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]))
        >>> summary(own, other)["paired_ratio_to_lora"]
        2.0
    """
    seconds = times["seconds"]
    median = statistics.median(seconds)
    # A single time has no quartiles.
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    ratio = paired = of_cores = None
    if baseline is not None:
        ratio = median / statistics.median(baseline["seconds"])
        paired, of_cores = (paired_ratio(times[own], baseline[own]) for own in ("seconds", "cpu_seconds"))
    return {
        "median_seconds": median,
        "iqr_seconds": quartiles[2] - quartiles[0],
        "ratio_to_lora": ratio,
        "paired_ratio_to_lora": paired,
        "paired_cpu_ratio_to_lora": of_cores,
    }


def speed(setting: Setting, seconds: Sequence[float], peak_tflops: float | None) -> dict[str, float]:
    """Tokens a second, and the operations of a model whose weights are frozen, 4·N a token."""
    tokens = setting.batch_size * setting.seq_len / statistics.median(seconds)
    tflops = 4 * setting.parameters * tokens / 1e12
    used = {} if peak_tflops is None else {"mfu": tflops / peak_tflops}
    return {"tokens_per_second": tokens, "model_tflops_per_second": tflops} | used


def table(contenders: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text, a contender to a line."""
    columns = [
        "median s",
        "iqr s",
        "to lora",
        "paired",
        "tokens/s",
        "compile s",
        "trainable",
        "program MB",
        "peak MB",
    ]
    lines = [f"{'':12} " + " ".join(f"{column:>10}" for column in columns)]
    for name, one in contenders.items():
        peak = one.get("peak_device_bytes") or one.get("peak_resident_bytes")
        cells = (
            _cell(one["median_seconds"], ".4f"),
            _cell(one["iqr_seconds"], ".4f"),
            _cell(one["ratio_to_lora"], ".3f"),
            _cell(one["paired_ratio_to_lora"], ".3f"),
            _cell(one["tokens_per_second"], ",.0f"),
            _cell(one["compile_seconds"], ".1f"),
            _cell(one["trainable_parameters"], ","),
            _cell(one["program_bytes"], ".0f", 1e6),
            _cell(peak, ".0f", 1e6),
        )
        lines.append(f"{name:12} " + " ".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def ratios(record: Mapping[str, Any]) -> str:
    """The times beside LoRA's, and memory where it was measured, as Markdown, with what they are from."""
    settings, about = record["settings"], record["environment"]
    contenders = record["contenders"]
    columns: dict[str, tuple[str, str, float]] = {
        "time, to lora's": ("paired_ratio_to_lora", ".2f", 1),
        "CPU time, to lora's": ("paired_cpu_ratio_to_lora", ".2f", 1),
        "memory, MB": ("peak_resident_bytes", ",.0f", 1e6),
    }
    measured = {title: own for title, own in columns.items() if any(own[0] in x for x in contenders.values())}
    rows = [["step", "s, median", *measured]]
    for name, one in contenders.items():
        cells = [_cell(one.get(figure), style, unit) for figure, style, unit in measured.values()]
        if BASELINE in contenders and name != BASELINE:
            cells[0] += _between(one["seconds"], contenders[BASELINE]["seconds"])
        rows.append([name, f"{one['median_seconds']:.2f}", *cells])
    return (
        f"{markdown(rows)}\n\n"
        f"{settings['model']}; steps of {settings['batch_size']} × {settings['seq_len']} tokens, "
        f"{settings['dtype']}, rank {settings['rank']}; medians of {settings['rounds']} rounds, ratios "
        f"within each, from the least to the greatest in brackets, on {settings['cores']} cores of "
        f"{device(about)}{_load(settings)}. "
        f"Commit {about['commit']}.\n"
    )


def _between(seconds: Sequence[float], baseline: Sequence[float]) -> str:
    """The least and the greatest of the ratios within each round, in brackets."""
    found = [own / other for own, other in zip(seconds, baseline, strict=True)]
    return f" [{min(found):.2f}, {max(found):.2f}]"


def _load(settings: Mapping[str, Any]) -> str:
    return f", at a load of {load:.1f} per core" if (load := settings.get("load_per_core")) else ""


def _cell(value: float | None, style: str, unit: float = 1) -> str:
    return "–" if value is None else format(value if unit == 1 else value / unit, style)


def _memory(name: str, setting: Setting) -> dict[str, Any]:
    """`peak_memory` of a contender, in a process of its own; why not, where that was killed."""
    from benchmarks.contenders.memory import peak_memory

    try:
        found = in_own_process(peak_memory, name, setting)
    except BrokenProcessPool as error:  # which need not cost us the times
        found = {"memory_error": str(error)}
    print(f"{name}: memory {found.get('memory_error', 'measured')}", flush=True)
    return found


if __name__ == "__main__":
    run(main)
