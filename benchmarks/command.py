"""The command line of a benchmark."""

import sys
from collections.abc import Callable

import tyro

from hylorada_jax.errors import HyLoRADAError


def run(command: Callable[..., None]) -> None:
    """Runs a command with the arguments it was started with; bad input ends with its error and status 2."""
    try:
        tyro.cli(command)
    except HyLoRADAError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
