"""Who contends, and what that needs."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence

from benchmarks.contenders.in_jax import load_base, ours, qwix_lora
from benchmarks.contenders.in_torch import peft_adapter, torch_device
from benchmarks.contenders.setting import Contender, Setting
from benchmarks.experiment import INSTALL, require_each_once
from hylorada_jax.errors import HyLoRADAError, require_packages
from hylorada_jax.models.causal_lm import CausalLM

# What is not the same in all by their nature: it is stated with the figures.
DIFFERENCES = (
    "Loss: lora, dora, hylorada_v1, hylorada and qwix lora share one that never holds the logits of all "
    "tokens and takes its gradient on the way; peft's is torch's cross-entropy of all float32 logits.",
    "DoRA: the gradient stops at the norm of W + sBA in dora and in peft dora; hylorada_v1 and hylorada "
    "differentiate it.",
    "Column scales: ours are resolved once a step from weights alone; peft dora computes its norm in every "
    "forward pass.",
    "hylorada also trains what its method adds by default: scales of positions, and of the attention logits "
    "and their distances; no sparse adapter.",
    "Optimizer: AdamW after clipping by the global norm everywhere. Ours has a rate and a decay per kind of "
    "parameter (LoRA+); qwix lora has optax's with one rate, peft's is torch's fused one with one rate.",
    "Precision of the adapters: float32 in ours and in peft's whatever the base's, the base's in qwix's.",
    "A step of JAX is one compiled program, which takes its state in place; torch runs eagerly.",
    "Resident memory: JAX's counts its compiled programs, and what its compiler does not give back.",
    "Rows are whole: no padding and no packed documents, and no contender is given a mask beside causality.",
)
CONTENDERS: dict[str, Callable[..., Contender]] = {
    "lora": functools.partial(ours, "lora"),
    "dora": functools.partial(ours, "dora"),
    "hylorada_v1": functools.partial(ours, "hylorada_v1"),
    "hylorada": functools.partial(ours, "hylorada"),
    "peft lora": functools.partial(peft_adapter, False),
    "peft dora": functools.partial(peft_adapter, True),
    "qwix lora": qwix_lora,
}


def build(name: str, setting: Setting, base: CausalLM | None = None) -> Contender:
    """Makes a contender ready to step from the base model's weights.

    Args:
        name: a key of `CONTENDERS`.
        setting: what all have in common.
        base: the loaded model, for JAX's contenders to share; None loads it where it is needed.

    Returns:
        The contender, compiled where it is to be compiled.

    Raises:
        HyLoRADAError: JAX computes on a device that torch does not have.
        ModelError: the model is not found, or our decoder does not have its family.
    """
    batch = setting.batch()
    if in_torch(name):
        return CONTENDERS[name](setting, batch)
    return CONTENDERS[name](setting, [batch], base or load_base(setting))


def build_all(names: Iterable[str], setting: Setting) -> dict[str, Contender]:
    """The contenders by name, each told of when it is ready; those of JAX share their base's weights."""
    base, found = None, {}
    for name in names:
        if base is None and not in_torch(name):
            base = load_base(setting)
        found[name] = build(name, setting, base)
        seconds = found[name].compile_seconds
        print(f"{name}: ready" + (f", compiled in {seconds:.1f} s" if seconds else ""), flush=True)
    return found


def in_torch(name: str) -> bool:
    """Whether a contender runs in torch."""
    return name.startswith("peft ")


def packages(name: str) -> tuple[str, ...]:
    """The packages that a contender needs besides ours."""
    if in_torch(name):
        return ("torch", "transformers", "peft")
    return ("qwix",) if name.startswith("qwix ") else ()


def check(names: Sequence[str], setting: Setting, rounds: int) -> None:
    """Refuses, before any model is loaded, what cannot be measured here.

    Raises:
        HyLoRADAError: a contender is unknown or given twice, a package is missing, torch lacks JAX's device,
            or a number is not positive.
        ModelError: the model is not found, or our decoder does not have its family.
    """
    if unknown := [name for name in names if name not in CONTENDERS]:
        rule = f"A contender must be one of {', '.join(CONTENDERS)}."
        raise HyLoRADAError(rule, ", ".join(unknown), "Choose among them.")
    require_each_once("contenders", names)
    for name in names:
        require_packages(
            f"The contender {name!r} needs the packages {', '.join(packages(name))}.",
            packages(name),
            f"{INSTALL}; or leave it out of --contenders.",
        )
    numbers = {
        "batch_size": setting.batch_size,
        "seq_len": setting.seq_len,
        "rounds": rounds,
        "threads": setting.torch_threads,
        "rank": setting.rank,
    }
    if wrong := {number: value for number, value in numbers.items() if value < 1}:
        rule = ", ".join(numbers) + " must be ≥ 1."
        raise HyLoRADAError(
            rule, ", ".join(f"{number}={value}" for number, value in wrong.items()), "Correct it."
        )
    if any(map(in_torch, names)):
        torch_device()
    setting.batch()


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed versions of the packages that contenders need besides ours."""
    needed = dict.fromkeys(package for name in names for package in packages(name))
    return {package: importlib.metadata.version(package) for package in needed}
