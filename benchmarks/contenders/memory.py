"""What a contender holds in memory, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.contenders.in_torch import torch_device
from benchmarks.contenders.roster import build, in_torch, packages
from benchmarks.contenders.setting import WARMUP, Setting, precision


def peak_memory(name: str, setting: Setting) -> dict[str, int | None]:
    """The peak memory of a contender's steps; to be called in a process that has done nothing else.

    Args:
        name: a key of `CONTENDERS`.
        setting: what all have in common.

    Returns:
        "libraries_resident_bytes": what the process held before it loaded the model; "peak_resident_bytes":
        what it held beyond that in a step, at most; "peak_device_bytes": what was allocated on a GPU at most,
        by torch in a step, by JAX since its start, which includes loading. None where it cannot be known.
    """
    for package in packages(name):
        importlib.import_module(package)
    jnp.zeros(1).block_until_ready()  # starts the device
    before = resident("VmRSS")
    with precision(setting):
        contender = build(name, setting)
    for _ in range(WARMUP):
        contender.step()
    # What loading and compiling had for a while is not part of a step: compiling SmolLM2's leaves 180 MB.
    gc.collect()
    trim()
    reset_peak()
    torch_on_gpu = in_torch(name) and torch_device() == "cuda"
    if torch_on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    contender.step()
    contender.step()
    peak = resident("VmHWM")
    in_jax = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    on_device = torch.cuda.max_memory_allocated() if torch_on_gpu else in_jax.get("peak_bytes_in_use")
    return {
        "libraries_resident_bytes": before,
        "peak_resident_bytes": None if peak is None or before is None else peak - before,
        "peak_device_bytes": on_device,
    }


def resident(which: str, process: int | str = "self") -> int | None:
    """VmRSS or VmHWM, its peak, of a process; None where there is no Linux to tell it."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(which)]
    return found[0] if found else None


def reset_peak() -> None:
    """The kernel's peak starts again from what the process holds now."""
    if (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def trim() -> None:
    """What the C library keeps of freed memory goes back."""
    if os.name == "posix" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
