"""What belongs beside a number that was measured: versions, commit, device."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def environment() -> dict[str, object]:
    """The versions, the commit and the device of this process.

    Returns:
        JSON-able: ``versions``, ``commit`` (None outside a checkout, with "+changes" where files differ from
        it), ``platform`` and ``device`` of JAX's default device, ``cpu``, and ``date`` (UTC).
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
    try:
        run = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
        found = subprocess.run(run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
