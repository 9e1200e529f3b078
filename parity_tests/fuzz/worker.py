"""A process that reads damaged files, one case after another, within limits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.terminal import printable
from parity_tests.fuzz.files import private
from parity_tests.fuzz.mutations import CANARY, damage
from parity_tests.fuzz.readers import OUTPUTS, READERS

MAX_SECONDS = 2.0
"""Of the processor's time, which does not depend on what else the machine does."""
MAX_MIB = 300
MAX_MESSAGE = 8000
_MEASURED = Path("/proc/self/clear_refs").exists()


class WrongError(Exception):
    """A case ended as none may."""


def case(name: str, seed: int | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs one case.

    Args:
        name: of the reader.
        seed: of the damage; None: the files are whole, and must be read.
        tell: is called with what is damaged, before it is read.

    Returns:
        "end": result, refused or wrong; "said": why it is wrong.
    """
    reader, random = READERS[name], Random(f"{name}:{seed}")
    with TemporaryDirectory(prefix="hylorada-fuzz-") as place:
        root = Path(place)
        private(root)
        directory = root / "given"
        directory.mkdir()
        files = reader.files(random)
        damaged = random.choice(reader.damaged or tuple(files))
        how = "whole files"
        for file, content in files.items():
            if file == damaged and seed is not None:
                how = f"{file}: {damage(directory / file, content, random)}"
            else:
                (directory / file).write_bytes(bytes(content))
        forged = reader.reseal is not None and seed is not None and random.random() < 0.5
        if forged and all(map(_is_small, directory.iterdir())):
            with contextlib.suppress(ValueError, OSError, TypeError, AttributeError, RecursionError):
                reader.reseal(directory)  # type: ignore[misc]
        tell(how)
        before = _digest(root, name)
        try:
            end, shown = _read(reader.read, directory, whole=seed is None)
            if CANARY in shown and not reader.follows:
                raise WrongError("a private file was read")
            if _digest(root, name) != before:
                raise WrongError("a file outside the output was changed")
        except WrongError as wrong:
            return {"end": "wrong", "said": str(wrong)}
        return {"end": end, "said": ""}


def _read(read: Callable[[Path], Any], directory: Path, *, whole: bool) -> tuple[str, str]:
    """How a reader ends within its limits, with a result or refused, and what it shows; else a WrongError."""
    start, baseline = time.process_time(), _memory("VmRSS")
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end, shown = "result", repr(read(directory))
    except HyLoRADAError as error:
        end, shown = "refused", str(error)
        if whole:
            raise WrongError(f"whole files are refused: {shown}") from error
        if len(shown) > MAX_MESSAGE or printable(shown) != shown:
            raise WrongError(f"a message of {len(shown)} characters: {shown[:200]!r}") from error
    except BaseException as error:  # pyo3's PanicException is no Exception
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}: {str(error)[:200]}"
        raise WrongError(said) from error
    seconds, mib = time.process_time() - start, _memory("VmHWM") - baseline
    if not whole and (seconds > MAX_SECONDS or mib > MAX_MIB):
        raise WrongError(f"{seconds:.1f} s, {mib} MiB")
    return end, shown


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Lets no case exhaust the machine: one that wants far more than it may have is refused it.

    What counts is memory that can be written: a file may be mapped however large it is.
    """
    if not _MEASURED:
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, ((_memory("VmData") + 2048) * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _memory(what: str) -> int:
    """VmData, VmRSS or VmHWM in MiB."""
    if not _MEASURED:
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) // 1024


def _is_small(path: Path) -> bool:
    """Whether it is a regular file that can be read whole: a pipe has no end."""
    kind = path.lstat()
    return stat.S_ISREG(kind.st_mode) and kind.st_size < 2**24


def _digest(root: Path, name: str) -> str:
    """A fingerprint of all files that the reader may not change."""
    sha = hashlib.sha256()
    for place, directories, names in os.walk(root):
        if name in OUTPUTS and place == str(root):
            directories.remove("given")
        for path in sorted(Path(place, each) for each in (*directories, *names)):
            kind = path.lstat()
            sha.update(f"{path} {kind.st_mode} {kind.st_size}".encode())
            if stat.S_ISLNK(kind.st_mode):
                sha.update(os.readlink(path).encode())
            elif _is_small(path):
                sha.update(path.read_bytes())
    return sha.hexdigest()


def main() -> None:
    """Answers every line "reader seed" of stdin with two: what is damaged, and how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is not an answer
    os.dup2(1, 2)

    def answer(what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    answer("ready")
    for line in sys.stdin:
        name, seed = line.split()
        answer(case(name, None if seed == "whole" else int(seed), answer))


if __name__ == "__main__":
    main()
