"""The program of the process that renders chat templates; `template_process` starts it.

A line of standard input is [template, its variables, seconds] in JSON. The answer is a line too: ["text", the
text], ["error", what the template raised] or ["limit", what it exceeded]. Imports nothing of this package.
"""

import datetime
import functools
import importlib
import json
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


class _Generation(Extension):
    """The block {% generation %}: it marks what an assistant wrote, and renders as what stands in it."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


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


def _answer(line: bytes, longest: int) -> tuple[str, str]:
    try:
        template, variables, seconds = json.loads(line)
        if hasattr(signal, "setitimer"):  # should the parent be gone when time is up
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        text = _compiled(template).render(variables)
    except MemoryError:
        return "limit", "it takes more memory"
    except Exception as error:  # the template is code, and may raise anything
        return "error", f"{type(error).__name__}: {error}"[:500]
    if len(text) > longest:
        return "limit", f"it writes {len(text):,} characters"
    return "text", text


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
        answer = json.dumps(_answer(line, longest), ensure_ascii=False)
        sys.stdout.buffer.write(answer.encode("utf-8", "surrogatepass") + b"\n")
        sys.stdout.buffer.flush()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
