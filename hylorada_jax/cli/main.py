"""The commands by name."""

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from hylorada_jax import __version__
from hylorada_jax.cli.chat import chat
from hylorada_jax.cli.data import data
from hylorada_jax.cli.evaluate import evaluate
from hylorada_jax.cli.finetune import finetune
from hylorada_jax.cli.flags import options_of, refuse_empty, refuse_repeated
from hylorada_jax.cli.generate import generate
from hylorada_jax.cli.help_text import unwrapped
from hylorada_jax.cli.inspect import inspect
from hylorada_jax.cli.merge import merge
from hylorada_jax.cli.params import params
from hylorada_jax.cli.parity import parity
from hylorada_jax.cli.peft import export_peft, import_peft
from hylorada_jax.cli.plan import plan
from hylorada_jax.cli.recipe import expanded, named_recipe
from hylorada_jax.errors import ConfigError, HyLoRADAError, near
from hylorada_jax.terminal import brief, discard_output, one_line, printable

_MEMORY = "Lower --batch-size or --max-new-tokens, or use --base-dtype nf4 or --mesh."
_FILE = "Check that the path exists, who may use it, and the space on its disk."
_TEXT = "Set PYTHONUTF8=1, so that all text is written as UTF-8."

COMMANDS: dict[str, Callable[..., None]] = {
    "finetune": finetune,
    "data": data,
    "evaluate": evaluate,
    "generate": generate,
    "chat": chat,
    "params": params,
    "plan": plan,
    "inspect": inspect,
    "merge": merge,
    "export-peft": export_peft,
    "import-peft": import_peft,
    "parity": parity,
}


def main() -> None:
    """Runs the command and ends with what went wrong alone, in a few lines.

    The exit status is 2 for bad input, 1 where memory is short, 130 for an interrupt, and 141 where nobody
    reads the output any more, as in ``hylorada … | head``. One of several processes that fails ends at once.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have bytes that are not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # not the main thread, which alone is interrupted
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    before = warnings.formatwarning
    # A line, without the place in our source that it came from.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {brief(message)}\n"
    try:
        _run()
    except HyLoRADAError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except BrokenPipeError:
        discard_output()
        sys.exit(_fail("interrupted: nobody reads the output", 141))
    except OSError as error:  # what no command has named: a file that cannot be read or written
        sys.exit(_fail(_said("A file could not be read or written", error, _FILE), 2))
    except UnicodeEncodeError as error:
        sys.exit(_fail(_said("A text could not be written", error, _TEXT), 2))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            if not (message := (processes := _processes()) and processes.lost_another(error)):
                raise
            sys.exit(_fail(message, 1))
        sys.exit(_fail(_said("There is not enough memory", error, _MEMORY), 1))
    except KeyboardInterrupt as interrupt:
        sys.exit(_fail(str(interrupt) or "interrupted", 130))
    finally:
        warnings.formatwarning = before


def _interrupt(number: int, frame: Any) -> None:
    """Python's own handler; but in jaxlib's initialisation, in C++, its exception would abort the process."""
    spec = getattr(sys.modules.get("jax"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        os._exit(_fail("interrupted", 130))
    signal.default_int_handler(number, frame)


def _run() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"hylorada {__version__}")
        return
    given = sys.argv[1:]
    if given and not given[0].startswith("-") and given[0].replace("_", "-") not in COMMANDS:
        raise ConfigError("The first word must be a command.", given[0], near(given[0], COMMANDS))
    known = options_of(COMMANDS.get("".join(given[:1]).replace("_", "-"), finetune))
    refuse_repeated(given, known)
    arguments, recipe = expanded(given, known), named_recipe(given)
    try:
        refuse_empty(arguments)
        tyro.extras.subcommand_cli_from_dict(
            {name: unwrapped(command) for name, command in COMMANDS.items()},
            args=arguments,
            prog="hylorada",
            description="HyLoRADA: parameter-efficient fine-tuning of language models in JAX.",
        )
    except ConfigError as error:
        raise (error if recipe is None else error.at(f"{recipe} or an option beside it")) from None
    except SystemExit as stop:
        if recipe is not None and stop.code:
            print(f"note: options come from the recipe {one_line(recipe)} too", file=sys.stderr)
        raise
    finally:
        print(end="", flush=True)  # what cannot be written is to be known before Python ends


def _said(rule: str, error: BaseException, remedy: str) -> str:
    return f"error: {HyLoRADAError(rule, error, remedy)}"


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads stderr either
        print(printable(message), file=sys.stderr)
    if processes := _processes():
        processes.end_at_once(status)
    return status


def _processes() -> Any:
    """The module of that name, where a command has asked for it: only then there can be several."""
    return sys.modules.get("hylorada_jax.placement.processes")
