"""A whole run in one file: the options of ``hylorada finetune`` as JSON or YAML."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from hylorada_jax.cli.adapter import AdapterOptions
from hylorada_jax.cli.flags import flag_of, takes_several
from hylorada_jax.cli.reading import DataOptions
from hylorada_jax.errors import ConfigError, near
from hylorada_jax.io.files import user_path
from hylorada_jax.io.reading import read_bounded
from hylorada_jax.terminal import one_line
from hylorada_jax.text import parse_json, shown
from hylorada_jax.training.config import TrainingConfig

_OPTION = "--recipe"
_RULE = "A recipe must be a file of options by name, in JSON or YAML."
_REMEDY = "Take recipe.json of a run for a model."
_MAX_BYTES = 2**20
# YAML's reader takes a fifth of a millisecond for every token, of which one byte may be one.
_MAX_YAML_BYTES = 2**16
_MAX_DIGITS = 100
# Where a run is kept, and what becomes of one that is there, is not part of what repeats it.
_NOT_REPEATED = ("output", "resume", "overwrite")
# Options that have a value by default, and can be without.
_WITH_VALUE = {flag_of(field.name) for field in fields(TrainingConfig) if field.default is not None}
# An option, and the other one that counts in its place wherever it has a value.
_IN_PLACE = {"--steps": "--epochs", "--warmup-ratio": "--warmup-steps"}


class _PlainYaml(yaml.SafeLoader):
    """YAML of values that are written out, so that what is read is no larger than its file."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _not_plain(event, "an alias (*)")
        if event.anchor:
            raise _not_plain(event, "an anchor (&)")
        if event.tag:
            raise _not_plain(event, "a tag (!)")
        node = super().compose_node(parent, index)
        if node.tag == "tag:yaml.org,2002:merge":
            raise _not_plain(event, "a merge key (<<)")
        # A number in base 60 takes the square of its length.
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _MAX_DIGITS:
            raise _not_plain(event, f"a number of {len(node.value):,} characters")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once([(self.construct_object(key, deep), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """The keys with their values, none of which is there twice: the last would silently count."""
    keys = [key for key, _ in pairs if isinstance(key, str)]
    counts = Counter(map(flag_of, keys))
    if twice := [key for key in keys if counts[flag_of(key)] > 1]:
        rule = "A recipe must have each option once."
        raise ConfigError(rule, " and ".join(map(shown, twice)), "Leave one of them out.")
    return dict(pairs)


def _not_plain(event: yaml.Event, found: str) -> ConfigError:
    rule = f"A recipe must have no tag, anchor, alias, merge key or number of over {_MAX_DIGITS} characters."
    place = f"line {event.start_mark.line + 1}, column {event.start_mark.column + 1}"
    return ConfigError(rule, f"{place}: {found}", "Write the value out.")


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
    settings = asdict(training)
    has = {flag_of(name) for name, value in settings.items() if value is not None}
    idle = {one for one, other in _IN_PLACE.items() if other in has}
    settings = {n: v for n, v in settings.items() if n not in _NOT_REPEATED and flag_of(n) not in idle}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in {**given, **settings}.items()
    }


def expanded(arguments: Sequence[str], known: Mapping[str, Collection[Any]]) -> list[str]:
    """A command line with what its recipe says in front of the options beside it, which so win.

    Steps beside a recipe win over its epochs too, and the ratio of the warm-up over its steps.

    Args:
        arguments: of the program; only ``finetune`` has a recipe.
        known: the options of the command, and the types of each.

    Returns:
        The same, or more of them.

    Raises:
        ConfigError: the recipe cannot be read, or has a key that is no option or a value that none
            takes; or of two options that replace each other both are given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = Path(place) / "run.yaml"
        ...     _ = file.write_text("steps: 5\\npacking: false\\ntargets: [q_proj, v_proj]")
        ...     known = {"--steps": [int], "--packing": [bool], "--targets": [tuple]}
        ...     expanded(["finetune", "--recipe", str(file), "--steps", "9"], known)[1:6]
        ['--steps=5', '--no-packing', '--targets', 'q_proj', 'v_proj']
    """
    command, *rest = arguments or [""]
    path = named_recipe(arguments)
    beside = {flag_of(argument.partition("=")[0]) for argument in rest if argument.startswith("--")}
    if command == "finetune":
        _refuse_both(beside)
    if path is None:
        return [*arguments]
    replaced = {other for one, other in _IN_PLACE.items() if one in beside}
    said: list[str] = []
    options = _read(path)
    try:
        _refuse_both({flag_of(name) for name, value in options.items() if value is not None})
    except ConfigError as error:
        raise error.at(str(path)) from None
    for name, value in options.items():
        option = flag_of(name)
        if (positive := option if option in known else option.replace("--no-", "--", 1)) not in known:
            rule = "A recipe's keys must be options of finetune."
            raise ConfigError(rule, f"{path}: {shown(name)}", near(name, [key[2:] for key in known]))
        if option == _OPTION:
            rule = "A recipe has all of its options in one file."
            raise ConfigError(rule, f"{path}: {shown(name)}", "Copy that recipe's options into this one.")
        try:
            said += () if option in replaced else _option(name, positive, value, known[positive])
        except ConfigError as error:
            raise error.at(str(path)) from None
    return [command, *said, *rest]


def _refuse_both(given: Collection[str]) -> None:
    for one, other in _IN_PLACE.items():
        if one in given and other in given:
            raise ConfigError(f"{other} counts in place of {one}.", "both", "Give one of them.")


def named_recipe(arguments: Sequence[str]) -> Path | None:
    """The file of a command line's recipe, or None without one; only ``finetune`` has any."""
    command, *rest = arguments or [""]
    named = [(i, a) for i, a in enumerate(rest) if a == _OPTION or a.startswith(f"{_OPTION}=")]
    if command != "finetune" or not named:
        return None
    at, argument = named[-1]
    return user_path(argument.partition("=")[2] or (rest[at + 1] if at + 1 < len(rest) else ""))


def _read(path: Path) -> dict[str, Any]:
    is_json = path.suffix == ".json"
    limit = _MAX_BYTES if is_json else _MAX_YAML_BYTES
    content = read_bounded(path, _RULE, ConfigError, _REMEDY, limit=limit)
    try:
        text = content.decode()
        options = parse_json(text, _once) if is_json else yaml.load(text, _PlainYaml)
    except ConfigError as error:
        raise error.at(str(path)) from None
    except Exception as error:  # yaml's constructors raise any
        raise ConfigError(_RULE, f"{path}: {error}", _REMEDY) from error
    if not isinstance(options, dict) or not all(isinstance(name, str) and name for name in options):
        raise ConfigError(_RULE, f"{path}: {shown(options)}", _REMEDY)
    return options


def _option(name: str, option: str, value: Any, types: Collection[Any]) -> Iterator[str]:
    """The words of an option, which a recipe may call by --no- and its name."""
    switch = bool in types
    if value is None and NoneType not in types:
        rule = "In a recipe, only options that may be without a value are null."
        raise ConfigError(rule, f"{name}: null", "Leave this option out.")
    if value is not None and switch != isinstance(value, bool):
        rule = "In a recipe, switches are true or false, and no other option is."
        raise ConfigError(rule, f"{name}: {shown(value)}", "Correct this option.")
    match value:
        case None if option not in _WITH_VALUE:  # as it is by default
            return
        case bool():
            yield option if value == (option == flag_of(name)) else f"--no-{option[2:]}"
        case str() if not {str, Path} & {*types} and one_line(value) != value:
            # It is none of the choices and no number, and what parses the line prints it as it is.
            rule = "In a recipe, a choice or a number must be a printable line."
            raise ConfigError(rule, f"{name}: {shown(value)}", "Correct this option.")
        case None | int() | float() | str():
            yield f"{option}={value}"
        case [] if takes_several(types):  # as if it were left out
            return
        case list() if value and all(isinstance(item, str) for item in value):
            if not takes_several(types):
                rule = "In a recipe, only options that take several values are lists."
                raise ConfigError(rule, f"{name}: {shown(value)}", "Give one value.")
            if options := [item for item in value if item.startswith("-")]:
                rule = 'In a recipe, no text of a list begins with "-": it would be another option.'
                raise ConfigError(rule, f"{name}: {shown(options[0])}", "Correct this option.")
            yield from (option, *value)
        case _:
            rule = "A recipe's values must be texts, numbers, true, false, null, or lists of texts."
            raise ConfigError(rule, f"{name}: {shown(value)}", "Correct this option.")
