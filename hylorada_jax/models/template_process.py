"""The process in which chat templates are rendered, so that time and memory can be taken from them.

A template is a program that comes with a model, and there is no list of all the ways in which jinja2 can be
made to fill the memory. The process has nothing that is worth having: no files, no children, and of the
environment the time zone and the places of libraries alone.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hylorada_jax.errors import DataError
from hylorada_jax.portions import portions

SECONDS = 5.0
"""For one conversation; one of ten thousand messages takes a tenth of them."""
MEMORY = 512 * 2**20
"""Bytes of address space. Windows and macOS do not limit it; there SECONDS bound what can be filled."""
LONGEST = 2**24
"""The characters of a text, several times the longest context."""
_AT_ONCE = 2**22
"""Characters of JSON that the process gets at once, unless one request is longer: it holds all of them."""
_STARTING = 60.0  # seconds, for Python and jinja2 on a busy machine
# Of the environment: the time zone, and where the system finds Python's libraries.
_KEPT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_Process: TypeAlias = "subprocess.Popen[bytes]"


class Rendered(NamedTuple):
    """What a template renders.

    Attributes:
        text: the whole of it.
        generated: the characters [start, stop) of each part that stands in ``{% generation %}``, in order.
    """

    text: str
    generated: list[tuple[int, int]]


def run_template(
    template: str, requests: Sequence[dict[str, Any]], seconds: float = SECONDS
) -> list[Rendered | DataError]:
    """What a template renders for each of several requests, within limits of time, memory and length.

    The process is started by the first call, takes one call at a time, and ends with this one. It is killed
    where a request exceeds a limit; the next one starts another. A fork starts its own.

    Args:
        template: in jinja2, of any origin.
        requests: the variables of each, of JSON's types.
        seconds: to render a request in.

    Returns:
        What is rendered for each request, or the error where the template raises something or exceeds a
        limit.

    Raises:
        DataError: the process does not start.

    Example:
        >>> run_template("{{ 6 * n }}", [{"n": 7}])
        [Rendered(text='42', generated=[])]
    """
    return [
        each
        for part in portions(map(json.dumps, requests), len, _AT_ONCE)
        for each in _run(template, part, seconds)
    ]


def _run(template: str, requests: Sequence[str], seconds: float) -> list[Rendered | DataError]:
    found: list[Rendered | DataError] = []
    while len(found) < len(requests):
        try:
            found += map(_result, _worker.ask(template, requests[len(found) :], seconds))
        except _EndedError as ended:
            found += map(_result, ended.answers)
            found.append(
                DataError(
                    f"A chat template must render at most {LONGEST:,} characters, within {seconds:g} seconds "
                    f"and {MEMORY // 2**20} MiB.",
                    str(ended),
                    "Shorten the conversation. If it is short, do not trust this model's template.",
                )
            )
    return found


def _result(answer: Rendered | str) -> Rendered | DataError:
    if isinstance(answer, Rendered):
        return answer
    return DataError(
        "The messages must be what the model's chat template accepts.",
        answer,
        "Check the roles, their order, and that each message has a content.",
    )


class _EndedError(Exception):
    """The process has ended, or was ended, at the request after the answers."""

    def __init__(self, why: str, answers: list[Rendered | str]) -> None:
        super().__init__(why)
        self.answers = answers


class _Worker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def ask(self, template: str, requests: Sequence[str], seconds: float) -> list[Rendered | str]:
        """What is rendered, or what the template raises; an _EndedError where a limit is exceeded."""
        line = f"[{json.dumps(template)}, [{', '.join(requests)}], {seconds}]\n".encode()
        answers: list[Rendered | str] = []
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self.stop()
                    self._process = _start()
                with contextlib.closing(_exchange(self._process, line, seconds)) as lines:
                    for _ in requests:
                        answers.append(_parsed(next(lines)))
                return answers
            except (TimeoutError, EOFError) as error:
                self.stop()
                raise _EndedError(str(error), answers) from error
            except BaseException:  # KeyboardInterrupt too: the next answer would be to this question
                self.stop()
                raise

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def forget(self) -> None:
        """In a fork: the process is the parent's, and the lock may be held by a thread that is not here."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            process.returncode = 0  # nothing to wait for
            _close(process)


def _start() -> _Process:
    program = Path(__file__).with_name("template_worker.py")
    # Isolated: neither the working directory nor a script's has a module for it.
    command = [sys.executable, "-I", "-S", str(program), str(MEMORY), str(LONGEST), *_places()]
    process = None
    try:
        process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
        with contextlib.closing(_exchange(process, b"", _STARTING)) as lines:
            next(lines)
    except (OSError, EOFError) as error:  # TimeoutError too
        if process is not None:
            _end(process)
        raise DataError(
            "Chat templates are rendered in a process of their own, by the same Python.",
            f"{sys.executable!r} does not start it: {error}",
            f"Try it: `{' '.join(command)}`.",
        ) from error
    return process


def _places() -> list[str]:
    """The directories in which jinja2 and what it needs are installed."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    return [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]


def _exchange(process: _Process, line: bytes, seconds: float) -> Generator[bytes]:
    """Writes a line and reads lines, until it is closed; the process is killed where one takes longer."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline, over = time.monotonic() + seconds, threading.Event()

    def watch() -> None:
        while (left := deadline - time.monotonic()) > 0:
            if over.wait(left):
                return
        process.kill()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    rest, read = memoryview(line), b""
    try:
        while True:
            while rest:
                rest = rest[process.stdin.write(rest) :]
            parts = [read]
            while b"\n" not in parts[-1] and sum(map(len, parts)) < 8 * LONGEST:
                if not (chunk := process.stdout.read(2**16)):
                    break
                parts.append(chunk)
            answer, end, read = b"".join(parts).partition(b"\n")
            if time.monotonic() >= deadline:
                raise TimeoutError("it takes longer")
            if not end:
                raise EOFError("its process dies")
            yield answer
            deadline = time.monotonic() + seconds
    except BrokenPipeError as error:
        raise EOFError("its process dies") from error
    finally:
        over.set()
        watching.join()


def _parsed(answer: bytes) -> Rendered | str:
    """What is rendered, or what the template raised; an EOFError for anything else."""
    try:
        match json.loads(answer.decode("utf-8", "surrogatepass")):
            case ["text", str(text), list(marked)]:
                return Rendered(text, [(int(start), int(stop)) for start, stop in marked])
            case ["error", str(raised)]:
                return raised
            case ["limit", str(exceeded)]:
                raise EOFError(exceeded)
    except (ValueError, TypeError, RecursionError):  # the process is not trusted
        pass
    raise EOFError("its process dies")


def _end(process: _Process) -> None:
    process.kill()
    process.wait()
    _close(process)


def _close(process: _Process) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
