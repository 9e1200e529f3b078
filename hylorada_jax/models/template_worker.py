"""The program of the process that renders chat templates; `template_process` starts it.

A line of standard input is [template, a list of its variables, seconds] in JSON. The answer is a line for
each of the list: ["text", the text, what of it {% generation %} marks], ["error", what the template raised]
or ["limit", what it exceeded]. Imports nothing of this package.
"""

import datetime
import functools
import importlib
import json
import re
import secrets
import signal
import sys
import time
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[3:]  # where the parent has jinja2, behind the standard library

import jinja2
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What Python and jinja2 import when they first need it, which is too late: no file can be opened then.
_LATE = (
    "encodings.unicode_escape", "html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap",
    "unicodedata",
)  # fmt: skip


# Written around what {% generation %} marks, and taken out again. No message can know it.
_MARK = f"\x02{secrets.token_hex(16)}"
_OPEN, _CLOSE = f"{_MARK}(", f"{_MARK})"


class _Generation(Extension):
    """The block {% generation %}: it marks what an assistant wrote, and renders as what stands in it."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (_OPEN, _CLOSE)
        )
        return jinja2.nodes.Scope([begin, *body, end], lineno=line)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    # The sandbox, because the template is code that comes with the model.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what HTML would read.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _confine(memory: int) -> None:
    """Takes from this process what a template that got out of the sandbox would use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for name in _LATE:
        importlib.import_module(name)
    time.localtime()  # reads the time zone's file
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS does not limit the address space
            continue


def _answer(template: str, variables: Any, seconds: float, longest: int) -> list[Any]:
    if hasattr(signal, "setitimer"):  # should the parent be gone when time is up
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        text, marked = _without_marks(_compiled(template).render(variables))
    except MemoryError:
        return ["limit", "it takes more memory"]
    except Exception as error:  # the template is code, and may raise anything
        return ["error", f"{type(error).__name__}: {error}".replace(_MARK, "")[:500]]
    if len(text) > longest:
        return ["limit", f"it writes {len(text):,} characters"]
    return ["text", text, marked]


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the characters [start, stop) of each outermost part that was marked."""
    parts = re.split(f"{_MARK}([()])", text)
    at, depth, start, marked = len(parts[0]), 0, 0, []
    for mark, part in zip(parts[1::2], parts[2::2], strict=True):
        depth += 1 if mark == "(" else -1
        if (mark, depth) == ("(", 1):
            start = at
        elif (mark, depth) == (")", 0):
            marked.append((start, at))
        at += len(part)
    return "".join(parts[::2]), marked


def main(memory: int, longest: int) -> None:
    """Answers requests until there are no more.

    Args:
        memory: the most that this process may use, in bytes.
        longest: the most characters of a text.
    """
    _confine(memory)
    sys.stdout.buffer.write(b"\n")  # ready
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        template, requests, seconds = json.loads(line)
        for variables in requests:
            answer = json.dumps(_answer(template, variables, seconds, longest), ensure_ascii=False)
            sys.stdout.buffer.write(answer.encode("utf-8", "surrogatepass") + b"\n")
            sys.stdout.buffer.flush()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
