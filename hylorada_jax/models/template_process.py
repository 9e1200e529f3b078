"""The process in which chat templates are rendered, so that time and memory can be taken from them.

A template is a program that comes with a model, and there is no list of all the ways in which jinja2 can be
made to fill the memory. The process has nothing that is worth having: no environment, no files, no children.
"""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TypeAlias

from hylorada_jax.errors import DataError

SECONDS = 5.0
"""For one conversation; one of ten thousand messages takes a tenth of them."""
MEMORY = 512 * 2**20
"""Bytes of address space. Windows and macOS do not limit it; there SECONDS bound what can be filled."""
LONGEST = 2**24
"""The characters of a text, several times the longest context."""
_STARTING = 60.0  # seconds, for Python and jinja2 on a busy machine
# Of the environment: the time zone, and where the system finds Python's libraries.
_KEPT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_Process: TypeAlias = "subprocess.Popen[bytes]"


def run_template(template: str, variables: dict[str, Any], seconds: float = SECONDS) -> str:
    """The text that a template renders, within limits of time, memory and length.

    The process is started by the first call, takes one call at a time, and ends with this one. It is killed
    where a template exceeds a limit; the next call starts another. A fork starts its own.

    Args:
        template: in jinja2, of any origin.
        variables: JSON's types.
        seconds: to render it in.

    Returns:
        The text.

    Raises:
        DataError: the template raises something or exceeds a limit.

    Example:
        >>> run_template("{{ 6 * n }}", {"n": 7})
        '42'
    """
    try:
        kind, text = _worker.ask([template, variables, seconds], seconds)
    except (TimeoutError, EOFError) as error:
        raise DataError(
            f"A chat template must render at most {LONGEST:,} characters, within {seconds:g} seconds and "
            f"{MEMORY // 2**20} MiB.",
            str(error),
            "Shorten the conversation. If it is short, do not trust this model's template.",
        ) from error
    if kind == "text":
        return text
    raise DataError(
        "The messages must be what the model's chat template accepts.",
        text,
        "Check the roles, their order, and that each message has a content.",
    )


class _Worker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def ask(self, request: Any, seconds: float) -> tuple[str, str]:
        """The answer; EOFError where the process dies of the question, TimeoutError where it takes longer."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self.stop()
                    self._process = _start()
                match _parsed(_exchange(self._process, line, seconds)):
                    case [("text" | "error") as kind, str(text)]:
                        return kind, text
                    case ["limit", str(text)]:
                        raise EOFError(text)
                raise EOFError("its process dies")
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
        _exchange(process, b"", _STARTING)
    except (OSError, EOFError) as error:
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


def _exchange(process: _Process, line: bytes, seconds: float) -> bytes:
    """Writes a line and reads one."""
    assert process.stdin is not None
    assert process.stdout is not None
    start, rest, answer = time.monotonic(), memoryview(line), b""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        while rest:
            rest = rest[process.stdin.write(rest) :]
        while not answer.endswith(b"\n") and len(answer) < 8 * LONGEST:
            if not (chunk := process.stdout.read(2**16)):
                break
            answer += chunk
    except BrokenPipeError:  # it is gone
        pass
    finally:
        timer.cancel()
    if time.monotonic() - start >= seconds:
        raise TimeoutError("it takes longer")
    if not answer.endswith(b"\n"):
        raise EOFError("its process dies")
    return answer


def _parsed(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):  # the process is not trusted
        return None


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
