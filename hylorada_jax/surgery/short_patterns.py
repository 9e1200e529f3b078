"""The fewest endings and patterns of names by which layers are chosen or have values; PEFT reads them too."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


def shortest_targets(selected: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The shortest endings of names that match these layers and no other.

    Args:
        selected: the names of the layers to match.
        names: the names of all linear layers.

    Returns:
        Endings of as many components as it takes; the full names, where none will do.

    Example:
        >>> names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj"]
        >>> shortest_targets(names[::2], names), shortest_targets(names[:1], names)
        (('attn.c_proj',), ('0.attn.c_proj',))
    """
    return _endings_of(selected, names) or tuple(selected)


def _endings_of(selected: Sequence[str], names: Sequence[str]) -> tuple[str, ...] | None:
    for length in range(1, 4):
        endings = dict.fromkeys(_ending(name, length) for name in selected)
        found = {name for name in names if any(_ending(name, n) in endings for n in range(1, length + 1))}
        if found == set(selected):
            return tuple(endings)
    return None


def _ending(name: str, length: int) -> str:
    return ".".join(name.split(".")[-length:])


def patterns_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    r"""Few patterns by which each layer has its value: a ``rank_pattern`` or ``alpha_pattern``, also PEFT's.

    Args:
        values: by the full names of all adapted layers.
        default: the value that needs no pattern.

    Returns:
        {pattern: value}: endings of names where these will do, else regular expressions of full names, in
        which a component is one of several numbers or any, or anything follows a number.

    Example:
        >>> patterns_of({"h.0.q": 4, "h.0.v": 8, "h.1.q": 4, "h.1.v": 8}, 4)
        {'v': 8}
        >>> patterns_of({"h.0.q": 4, "h.1.q": 8, "h.2.q": 8}, 4)
        {'^h\\.(?:1|2)\\.q': 8}
        >>> patterns_of({"h.0.q": 4, "h.0.v": 4, "h.1.q": 8, "h.1.v": 8}, 4)
        {'^h\\.1\\..*': 8}
    """
    found: dict[str, Any] = {}
    wide: dict[str, _Parts] = {}
    for value in dict.fromkeys(values.values()):
        if value == default:
            continue
        names = [name for name, own in values.items() if own == value]
        endings = _endings_of(names, list(values))
        if endings is None or any(part.isdigit() for ending in endings for part in ending.split(".")):
            wide = wide or _widened(values)
            endings = _alternatives(list(dict.fromkeys(wide[name] for name in names)))
        found |= dict.fromkeys(endings, value)
    return found


# No part of a name has a dot.
_ANY, _REST = "[^.]+", ".*"
_Parts = tuple[str, ...]


def _alternatives(names: Sequence[_Parts]) -> tuple[str, ...]:
    """Regular expressions of full names: what differs in one number alone put together, and this again."""
    found = [tuple((part,) for part in parts) for parts in names]
    for place in range(max(map(len, found))):
        alike: dict[Any, list[Any]] = {}
        for each in found:
            numbered = place < len(each) and each[place][0].isdigit()
            alike.setdefault((each[:place], each[place + 1 :]) if numbered else each, []).append(each)
        found = [
            (*first[:place], tuple(n for each in group for n in each[place]), *first[place + 1 :])
            if len(group) > 1
            else first
            for group in alike.values()
            for first in group[:1]
        ]
    return tuple(map(_pattern, found))


def _widened(values: Mapping[str, Any]) -> dict[str, _Parts]:
    """By name what it is in a pattern: with anything behind or for a number, where one value has all of that.

    Without it a pattern would list all experts of a mixture, in each of its layers.
    """
    split = {name: tuple(name.split(".")) for name in values}
    of_head, of_rest = defaultdict(list), defaultdict(list)
    for name, parts in split.items():
        for place in range(len(parts)):
            of_head[parts[: place + 1]].append(values[name])
            of_rest[parts[:place], parts[place + 1 :]].append(values[name])
    heads, rests = (
        {key for key, found in by_key.items() if len(found) > 1 and len({*found}) == 1}
        for by_key in (of_head, of_rest)
    )

    def widened(parts: _Parts) -> _Parts:
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        for place in numbers:
            if place + 1 < len(parts) and parts[: place + 1] in heads:
                return (*parts[: place + 1], _REST)
        for place in reversed(numbers):
            if (parts[:place], parts[place + 1 :]) in rests:
                return (*parts[:place], _ANY, *parts[place + 1 :])
        return parts

    return {name: widened(parts) for name, parts in split.items()}


def _pattern(parts: Sequence[_Parts]) -> str:
    # From its beginning on: PEFT takes a pattern for an ending of names.
    return "^" + r"\.".join(map(_part, parts))


def _part(found: _Parts) -> str:
    if len(found) > 1:
        return f"(?:{'|'.join(found)})"
    return found[0] if found[0] in (_ANY, _REST) else re.escape(found[0])
