"""A whole run in one file: the options of ``hylorada finetune`` as JSON or YAML."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hylorada_jax.cli.adapter import AdapterOptions
from hylorada_jax.cli.reading import DataOptions
from hylorada_jax.errors import ConfigError
from hylorada_jax.io.files import user_path
from hylorada_jax.io.reading import read_bounded
from hylorada_jax.text import parse_json, shown
from hylorada_jax.training.config import TrainingConfig

_OPTION = "--recipe"
_RULE = "A recipe must be a file of options by name, in JSON or YAML."
_MAX_BYTES = 2**20
# Where a run is kept, and what becomes of one that is there, is not part of what repeats it.
_NOT_REPEATED = ("output", "resume", "overwrite")
# An option, and the other one that counts in its place wherever it has a value.
_IN_PLACE = {"--steps": "--epochs", "--warmup-ratio": "--warmup-steps"}


def recipe_of(
    training: TrainingConfig, adapter: AdapterOptions, reading: DataOptions, **options: Any
) -> dict[str, Any]:
    """What repeats a run, by the names of the command's options.

    Args:
        training: its settings.
        adapter: what it trains, as given.
        reading: how its data are read.
        options: the command's others.

    Returns:
        Plain JSON types; :func:`expanded` reads them.
    """
    given = {**options, **vars(adapter), **vars(reading)}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    settings = {n: v for n, v in dataclasses.asdict(training).items() if n not in _NOT_REPEATED}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in {**given, **settings}.items()
    }


def expanded(arguments: Sequence[str]) -> list[str]:
    """A command line with what its recipe says in front of the options beside it, which so win.

    Steps beside a recipe win over its epochs too, and the ratio of the warm-up over its steps.

    Args:
        arguments: of the program; only ``finetune`` has a recipe.

    Returns:
        The same, or more of them.

    Raises:
        ConfigError: the recipe cannot be read, or has a value that no option takes; or of two options that
            replace each other both are given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = Path(place) / "run.yaml"
        ...     _ = file.write_text("steps: 5\\npacking: false\\ntargets: [q_proj, v_proj]")
        ...     expanded(["finetune", "--recipe", str(file), "--steps", "9"])[1:6]
        ['--steps=5', '--no-packing', '--targets', 'q_proj', 'v_proj']
    """
    command, *rest = arguments or [""]
    beside = {_called(argument.partition("=")[0]) for argument in rest if argument.startswith("--")}
    for one, other in _IN_PLACE.items() if command == "finetune" else ():
        if {one, other} <= beside:
            rule = f"{other} counts in place of {one}."
            raise ConfigError(rule, "both", "Give one of them.")
    named = [(i, a) for i, a in enumerate(rest) if a == _OPTION or a.startswith(f"{_OPTION}=")]
    if command != "finetune" or not named:
        return [*arguments]
    at, argument = named[-1]
    path = argument.partition("=")[2] or (rest[at + 1] if at + 1 < len(rest) else "")
    replaced = {other for one, other in _IN_PLACE.items() if one in beside}
    options = _read(user_path(path)).items()
    said = [text for name, value in options if _called(name) not in replaced for text in _option(name, value)]
    return [command, *said, *rest]


def _read(path: Path) -> dict[str, Any]:
    remedy = "Take recipe.json of a run for a model."
    content = read_bounded(path, _RULE, ConfigError, remedy, limit=_MAX_BYTES)
    try:
        text = content.decode()
        options = parse_json(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(_RULE, f"{path}: {error}", remedy) from error
    if not isinstance(options, dict) or not all(isinstance(name, str) and name for name in options):
        raise ConfigError(_RULE, f"{path}: {shown(options)}", remedy)
    return options


def _called(name: str) -> str:
    """An option by its name, with "_" or "-" and with or without the dashes before it."""
    return f"--{name.removeprefix('--').replace('_', '-')}"


def _option(name: str, value: Any) -> Iterator[str]:
    option = _called(name)
    match value:
        case bool():
            yield option if value else f"--no-{option[2:]}"
        case None | int() | float() | str():
            yield f"{option}={value}"
        case list() if value and all(isinstance(item, str) for item in value):
            yield from (option, *value)
        case _:
            rule = "A recipe's values must be texts, numbers, true, false, null, or lists of texts."
            raise ConfigError(rule, f"{name}: {shown(value)}", "Correct this option.")
