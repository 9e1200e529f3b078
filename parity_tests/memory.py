"""The memory that a piece of work takes, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def peak_memory(before: str, work: str) -> int:
    """The bytes that a fresh process takes in its work at the peak, beyond what it held before it."""
    # Not getrusage's peak: a child process begins with its parent's. Writing 5 resets the kernel's own.
    program = f"""
from pathlib import Path
def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
{before}
Path("/proc/self/clear_refs").write_text("5")
start = memory("VmRSS")
{work}
print(memory("VmHWM") - start)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(run.stdout)
