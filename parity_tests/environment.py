"""What belongs beside a number that was measured: versions, commit, device."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).parents[1]
# Benchmarks write these themselves, at the end of a run and before the next: they change no program.
_WRITTEN = ("benchmarks/results", "docs", "README.md")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def environment() -> dict[str, object]:
    """The versions, the commit and the device of this process.

    Returns:
        JSON-able: ``versions``, ``commit`` (None outside a checkout, with "+changes" where programs differ
        from it), ``platform`` and ``device`` of JAX's default device, ``cpu``, and ``date`` (UTC).
    """
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": _cpu(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _commit() -> str | None:
    """The commit of the checkout, and whether its programs are that commit's; None without one."""
    ask: dict[str, Any] = {"cwd": _ROOT, "capture_output": True, "text": True}
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], check=True, **ask)
    except (OSError, subprocess.CalledProcessError):
        return None
    programs = [".", *(f":(exclude){place}" for place in _WRITTEN)]
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *programs], **ask).returncode
    return found.stdout.strip() + "+changes" * bool(changed)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
