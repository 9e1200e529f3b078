"""The command line of a benchmark, and the file of what it measured."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tyro

from hylorada_jax.cli.help_text import unwrapped
from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.io.files import write_json
from hylorada_jax.terminal import discard_output


def run(command: Callable[..., None]) -> None:
    """Runs a command with the arguments it was started with; bad input ends with its error and status 2."""
    try:
        tyro.cli(unwrapped(command))
    except HyLoRADAError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as with `| head`
        discard_output()
        sys.exit(141)


def started() -> str:
    """The command that this program was started with, for the record of what it measured."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def load_per_core() -> float:
    """How much this machine has to do, all that runs on it, per core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def in_own_process(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a function returns in a process started for it; a BrokenProcessPool where that was killed."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *args).result()


def write_record(output: Path, name: str, record: dict[str, Any]) -> Path:
    """Writes a record, of which "environment" names the device, to <output>/<name>-<device>.json.

    Returns:
        The file.
    """
    device = re.sub(r"[^a-z0-9]+", "-", str(record["environment"]["device"]).lower())
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}-{device}.json"
    write_json(path, record)
    return path
