"""What tyro shows of a command: its docstring, and its options."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

_METAVARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}


def unwrapped(command: Callable[..., None]) -> Callable[..., None]:
    """The command, as its help is to be read.

    Each argument of its docstring is on one line, for tyro keeps a function's breaks. An option that has no
    value by default is left out for that: it takes no None, and its help has no (default: None).
    """
    function = inspect.unwrap(command)
    function.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(function.__doc__ or ""))
    parameters = inspect.signature(function).parameters
    _show_plainly(function, {name: each.default for name, each in parameters.items()})
    for group in filter(dataclasses.is_dataclass, get_type_hints(function).values()):
        _show_plainly(group, {field.name: field.default for field in dataclasses.fields(group)})
    return command


def _show_plainly(place: Any, defaults: Mapping[str, Any]) -> None:
    """Rewrites the types of options that have no value by default: of a function, or of a dataclass."""
    hints = get_type_hints(place, include_extras=True)
    empty = [name for name, value in defaults.items() if value is None or value in ((), "")]
    place.__annotations__ = place.__annotations__ | {
        name: Annotated[
            hints[name],
            tyro.conf.DisallowNone,
            tyro.conf.arg(metavar=_metavar(hints[name]), help_behavior_hint=""),
        ]
        for name in empty
    }


def _metavar(hint: Any) -> str | None:
    """The values that an option takes, None left out; None for a switch, which takes none."""
    if get_origin(hint) is Annotated:
        return _metavar(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, get_args(hint)))}}}"
    if get_origin(hint) is tuple:
        one = _metavar(get_args(hint)[0])
        return f"{one} [{one} ...]"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if kinds and all(get_origin(kind) is Literal for kind in kinds):
        return _metavar(Literal[*(value for kind in kinds for value in get_args(kind))])
    found = [_metavar(kind) for kind in kinds] or [_METAVARS.get(hint)]
    return None if None in found else "|".join(map(str, found))
