"""Damage to files: of their bytes, of what they say, and of what they are."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

CANARY = "canary"
"""A word that only private files contain: no result may."""

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**28, 2**31 - 1, 2**31, 2**32, 2**33, 2**53 + 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, None, True, False, 10**18, 10**400, -(10**12), 0.0, -0.5, 0.5, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), "", "no", "0", "a\0b", "\ud800", "\x1b[2J\u202e\n", "../private.safetensors",
    "../private.json", "/etc/hostname", "~", ".", "a" * 100_000, "é" * 300, "([a-z_.0-9]+)+!", "(",
    "a{9999}{9999}", "{{ 'a' * 2000000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{% include '../private.json' %}", [], [[]], [None], [1, "a"], [0] * 5000,
    {}, {"a": None}, {"type": "Sequence"}, {"": {}},
)  # fmt: skip
# What Python's json cannot be made to write stands for itself until the text is there.
_RAW = {
    "<deep>": "[" * 100_000 + "]" * 100_000,
    "<deep object>": '{"a":' * 5000 + "1" + "}" * 5000,
    "<long number>": "9" * 5000,
    "<no number>": "1e99999",
}
_TEXTS = (
    "{{ 'a' * 3000000000 }}", "{{ 'a'.center(3000000000) }}", "{{ messages.__class__ }}", "{{ 1 / 0 }}",
    "{% for a in range(100000000) %}{% endfor %}", "{{ 9 ** 9 ** 9 }}", "{{ [0] * 10 ** 10 }}", "{% endif %}",
    "{% set a = namespace() %}{{ a.b.c }}", "{{ lipsum }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ raise_exception('no') }}", "{{ '%*d' % (2000000000, 1) }}", "{{ 'a' | indent(3000000000) }}",
    "\0", "\x1b[2J", '"', ",", "\n", "\r", "\t", "}", "[", "\\", "\ufeff", "😀", "null", "-", "text",
)  # fmt: skip


class File(NamedTuple):
    """A valid file: what it says, in a form that has a mutation of its own.

    Args:
        form: json, jsonl, safetensors, fields, text or bytes.
        content: JSON-able; a list of them; (header, data); a list of bytes; str; bytes.
    """

    form: str
    content: Any

    def __bytes__(self) -> bytes:
        match self.form:
            case "json":
                return _json(self.content, 2)
            case "jsonl":
                return b"\n".join(map(_json, self.content)) + b"\n"
            case "safetensors":
                header = _json(self.content[0])
                return struct.pack("<Q", len(header)) + header + self.content[1]
            case "fields":
                return b"".join(self.content)
            case "text":
                return self.content.encode("utf-8", "surrogatepass")
        return self.content


def damage(path: Path, file: File, random: Random) -> str:
    """Writes a file that is damaged in one way or several, and says how."""
    kinds: list[Callable[[Path, File, Random], str]] = [_saying, _saying, _saying, _bytes, _bytes, _being]
    return random.choice(kinds)(path, file, random)


def _saying(path: Path, file: File, random: Random) -> str:
    """Changes what the file says."""
    done, content = [], b""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        mutated, how = _MUTATED.get(file.form, _mutated_bytes)(file, random)
        done.append(how)
        file, content = mutated, bytes(mutated)
    path.write_bytes(content)
    return "; ".join(done)


def _bytes(path: Path, file: File, random: Random) -> str:
    """Changes bytes, whatever they mean."""
    mutated, how = _mutated_bytes(File("bytes", bytes(file)), random)
    path.write_bytes(mutated.content)
    return how


def _being(path: Path, file: File, random: Random) -> str:
    """Puts something else in the file's place."""
    what = random.choice(("nothing", "empty", "directory", "dangling", "private", "loop", "pipe", "sparse"))
    match what:
        case "empty":
            path.write_bytes(b"")
        case "directory":
            path.mkdir()
        case "dangling":
            path.symlink_to("absent")
        case "private":
            suffix = ".safetensors" if path.suffix == ".safetensors" else ".json"
            path.symlink_to(Path("..", f"private{suffix}"))
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "sparse":
            path.write_bytes(bytes(file))
            os.truncate(path, 2**40)
    return what


def _json(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.replace("<again>", "").encode(errors="backslashreplace")


def _mutated_json(value: Any, random: Random) -> tuple[Any, str]:
    """A copy of JSON with one change at one place, and what it is."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places or random.random() < 0.03:
        new = random.choice([*_VALUES, *_RAW])
        return new, f"all = {new!r:.60}"
    holder, key = random.choice(places)
    match random.choice(("set", "set", "set", "set", "remove", "again", "rename", "nest", "swap")):
        case "remove":
            del holder[key]
            return value, f"without {key!r:.60}"
        case "again" if isinstance(holder, dict):
            holder[f"{key}<again>"] = random.choice(_VALUES)
            return value, f"{key!r:.60} twice"
        case "rename" if isinstance(holder, dict):
            name = str(random.choice([*holder, *map(str, _VALUES)]))
            holder[name] = holder.pop(key)
            return value, f"{key!r:.60} as {name!r:.60}"
        case "nest":
            holder[key] = random.choice(([holder[key]], {"a": holder[key]}, {key: holder[key]}))
            return value, f"{key!r:.60} within"
        case "swap":
            other, place = random.choice(places)
            copied = json.loads(json.dumps([holder[key], other[place]]))
            holder[key], other[place] = copied[1], copied[0]
            return value, f"{key!r:.60} for {place!r:.60}"
    holder[key] = random.choice([*_VALUES, *_RAW])
    return value, f"{key!r:.60} = {holder[key]!r:.60}"


def _places(value: Any) -> Any:
    """(list or dict, key) of every value in a tree."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _json_file(file: File, random: Random) -> tuple[File, str]:
    value, how = _mutated_json(file.content, random)
    return File("json", value), how


def _lines_file(file: File, random: Random) -> tuple[File, str]:
    lines = list(file.content)
    at = random.randrange(len(lines))
    lines[at], how = _mutated_json(lines[at], random)
    return File("jsonl", lines), f"line {at + 1}: {how}"


def _safetensors_file(file: File, random: Random) -> tuple[File, str]:
    header, data = file.content
    if random.random() < 0.15:
        size = random.choice(_NUMBERS) % 2**64
        return File("bytes", struct.pack("<Q", size) + bytes(file)[8:]), f"a header of {size} bytes"
    header, how = _mutated_json(header, random)
    return File("safetensors", (header, data)), how


def _fields_file(file: File, random: Random) -> tuple[File, str]:
    fields = list(file.content)
    at = random.randrange(len(fields))
    old = fields[at]
    match random.choice(("set", "set", "set", "remove", "again", "swap", "byte")):
        case "remove":
            del fields[at]
        case "again":
            fields.insert(at, old)
        case "swap":
            other = random.randrange(len(fields))
            fields[at], fields[other] = fields[other], old
        case "byte":
            fields[at] = random.randbytes(len(old))
        case _:
            number = random.choice(_NUMBERS) % 256 ** min(8, max(1, len(old)))
            fields[at] = number.to_bytes(8, "little")[: len(old)]
    return File("fields", fields), f"field {at}, {old[:12]!r}, is {b''.join(fields[at : at + 1])[:12]!r}"


def _text_file(file: File, random: Random) -> tuple[File, str]:
    text, new = file.content, random.choice(_TEXTS)
    at, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    if random.random() < 0.7:
        end = at
    return File("text", text[:at] + new + text[end:]), f"{new!r} for the characters {at} to {end}"


def _mutated_bytes(file: File, random: Random) -> tuple[File, str]:
    content = bytearray(bytes(file))
    at, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
    what = random.choice(("flip", "flip", "set", "cut", "insert", "remove", "again", "zeros"))
    match what:
        case "flip" | "set":
            for _ in range(random.choice((1, 1, 2, 8))):
                place = random.randrange(len(content)) if content else 0
                bits = 1 << random.randrange(8) if what == "flip" else random.randrange(256)
                content[place : place + 1] = bytes([(content[place] if content else 0) ^ bits])
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = random.randbytes(random.choice((1, 4, 100)))
        case "remove":
            del content[at:end]
        case "again":
            content[at:at] = content[at:end]
        case "zeros":
            content[at:end] = bytes(end - at)
    return File("bytes", bytes(content)), f"{what} at {at} to {end}"


_MUTATED: dict[str, Callable[[File, Random], tuple[File, str]]] = {
    "json": _json_file,
    "jsonl": _lines_file,
    "safetensors": _safetensors_file,
    "fields": _fields_file,
    "text": _text_file,
}
