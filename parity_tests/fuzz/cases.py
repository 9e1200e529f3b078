"""Cases given to a process of their own, which may hang or die of one."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from parity_tests.fuzz.readers import READERS

PROGRAM = [sys.executable, "-m", "parity_tests.fuzz.worker"]
_IMPORTING = 120.0
PATIENCE = 10.0
"""Seconds after which a case hangs: it has two of the processor's, and the machine is busy."""


class Outcome(NamedTuple):
    """How a case ended.

    Args:
        reader: its name.
        seed: of the damage; None: there was none.
        end: result, refused or wrong.
        how: what was damaged.
        said: what was wrong.
    """

    reader: str
    seed: int | None
    end: str
    how: str = ""
    said: str = ""

    def __str__(self) -> str:
        case = f"{self.reader} --first {self.seed} --cases 1"
        return f"python -m parity_tests.fuzz {case}: {self.end} {self.said}\n    of {self.how}"


class Workshop:
    """A process that runs cases, and another one in its place where it hangs or dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._warm: set[str] = set()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, reader: str, seed: int | None) -> Outcome:
        """The outcome of a case. A reader first reads whole files, and imports what it needs."""
        if self._process is None:
            self._start()
        if reader not in self._warm:
            self._warm.add(reader)
            if seed is not None and (whole := self.ask(reader, None)).end == "wrong":
                return whole
            return self.ask(reader, seed)
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(f"{reader} {'whole' if seed is None else seed}\n".encode())
        process.stdin.flush()
        patience = _IMPORTING if seed is None else PATIENCE
        how, ended = self._line(patience), self._line(patience)
        if ended is None:
            try:
                said = f"the process died with {process.wait(1)}"
            except subprocess.TimeoutExpired:
                said = f"no end after {patience:g} s"
            self._end()
            return Outcome(reader, seed, "wrong", str(how), said)
        return Outcome(reader, seed, ended["end"], how, ended["said"])

    def _start(self) -> None:
        self._process = subprocess.Popen(
            PROGRAM,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
            bufsize=0,
        )
        if (answer := self._line(_IMPORTING)) != "ready":
            raise RuntimeError(f"the process of the cases did not start: {answer!r}")

    def _line(self, seconds: float) -> Any:
        """What the process says; None where it has ended, or says nothing for so long."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None
        self._warm.clear()


def cases_of(reader: str, cases: int, first: int = 0) -> Iterator[int]:
    """The seeds of a reader's cases."""
    yield from range(first, first + max(1, round(cases * READERS[reader].share)))
