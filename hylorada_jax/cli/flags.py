"""Settings by the names of the command line's options."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hylorada_jax.errors import ConfigError

_MAY_BE_EMPTY = ("--prompt", "--mesh")


def flag_of(name: str) -> str:
    """The option of a setting, whose name may have "_" or "-", with or without the dashes before it.

    Example:
        >>> flag_of("warmup_ratio"), flag_of("--eval_every")
        ('--warmup-ratio', '--eval-every')
    """
    return f"--{name.removeprefix('--').replace('_', '-')}"


def options_of(command: Callable[..., None]) -> dict[str, tuple[Any, ...]]:
    """The options of a command, those of its groups too, each with its type and those of a union."""
    hints = {name: hint for name, hint in get_type_hints(inspect.unwrap(command)).items() if name != "return"}
    groups = [get_type_hints(h) if is_dataclass(h) else {name: h} for name, h in hints.items()]
    return {flag_of(name): (hint, *get_args(hint)) for group in groups for name, hint in group.items()}


def takes_several(types: Collection[Any]) -> bool:
    """Whether an option of such types has as many values as are given.

    Example:
        >>> takes_several([tuple[str, ...], None]), takes_several([str])
        (True, False)
    """
    return tuple in (get_origin(each) or each for each in types)


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raises a ConfigError for an option whose value is empty, as of a shell variable that is not set.

    Args:
        arguments: of a command.

    Example:
        >>> refuse_empty(["finetune", "--prompt", ""])
        >>> refuse_empty(["finetune", "--output", ""])
        Traceback (most recent call last):
        ...
        hylorada_jax.errors.ConfigError: The value of --output must not be empty.
          received: --output ""
          remedy:   Give one, or leave --output out.
    """
    option = ""
    for argument in arguments:
        if argument.startswith("--"):
            option, given, value = argument.partition("=")
        else:
            given, value = "=", argument
        if given and not value and option and flag_of(option) not in _MAY_BE_EMPTY:
            rule = f"The value of {option} must not be empty."
            raise ConfigError(rule, f'{option} ""', f"Give one, or leave {option} out.")


def refuse_repeated(arguments: Sequence[str], known: Mapping[str, Collection[Any]]) -> None:
    """Raises a ConfigError for an option of several values that is there twice: only the last would count.

    Args:
        arguments: of a command.
        known: its options, and the types of each.

    Example:
        >>> known = {"--data": (tuple[str, ...],), "--steps": (int,)}
        >>> refuse_repeated(["finetune", "--steps", "1", "--steps", "2"], known)
        >>> refuse_repeated(["finetune", "--data", "a", "--data", "b"], known)
        Traceback (most recent call last):
        ...
        hylorada_jax.errors.ConfigError: An option of several values must be given once.
          received: --data twice
          remedy:   Give all of its values behind one --data.
    """
    given = [flag_of(argument.partition("=")[0]) for argument in arguments if argument.startswith("--")]
    for option, count in Counter(given).items():
        if count > 1 and takes_several(known.get(option, ())):
            rule = "An option of several values must be given once."
            raise ConfigError(rule, f"{option} twice", f"Give all of its values behind one {option}.")


def in_flags(error: ConfigError, flags: Mapping[str, str]) -> ConfigError:
    """An error about settings that calls them by their options.

    Names that are words too ("steps") are replaced where they begin a sentence or stand before "=".

    Args:
        error: about some of the settings.
        flags: the options by the settings' names.

    Example:
        >>> error = ConfigError("steps must be even.", "steps=3, eval_every=None", "Leave eval_every out.")
        >>> print(in_flags(error, {"steps": "--steps", "eval_every": "--eval-every"}))
        --steps must be even.
          received: --steps=3, --eval-every=None
          remedy:   Leave --eval-every out.
    """
    some = "|".join(flags)
    telling = "|".join(name for name in flags if "_" in name)
    pattern = re.compile(rf"^(?:{some})\b|\b(?:{some})(?==)|\b(?:{telling})\b")

    def said(text: object) -> str:
        found = pattern.sub(lambda name: flags[name[0]], str(text))
        return re.sub(r"(--[\w-]+)=True\b", r"\1", found)  # as a switch is given

    return type(error)(said(error.rule), said(error.received), said(error.remedy))
