"""The header of a GGUF file: its metadata and where each tensor lies.

Parsed here with ``struct``, because the reader of the gguf package makes an array per string and takes
seconds on a vocabulary. Nothing that the file says is believed before it is compared with its size.

Reference: the GGUF specification, version 3.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from msgspec import Meta

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked, unread

REMEDY = "Convert or download it again."

_MAX_HEADER = 2**25
"""In bytes: twice what the largest vocabularies take; what Python builds of it stays within 300 MiB."""
_MAX_ENTRIES = 2**16
"""Keys, and tensors: a model of a hundred layers has some thousand."""
_MAX_AXES = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS = {code: struct.Struct("<" + code) for code in _SCALARS.values()}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the file and how it is stored."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file: its metadata and the place of each tensor, no weights.

    Attributes:
        path: of the file.
        metadata: bool, int, float and str; an array of strings is a list, one of numbers a numpy array.
        tensors: by name; each lies in the file, and no two on the same bytes.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


class _General(msgspec.Struct, rename={"alignment": "general.alignment", "parts": "split.count"}):
    """What the metadata says of the file itself."""

    alignment: Annotated[int, Meta(ge=1, le=2**20)] = 32
    parts: int = 1


class _DamagedError(Exception):
    """What is wrong with a header, in words."""


class _Cursor:
    """Reads little-endian values one after the other from a mapped file, as far as a header may go."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.end = data, 4, min(len(data), _MAX_HEADER)

    def number(self, code: str) -> Any:
        kind, start = _NUMBERS[code], self.position
        self.position += kind.size
        if self.position > self.end:
            raise _DamagedError(f"the header goes on past byte {self.end:,}")
        return kind.unpack_from(self.data, start)[0]

    def count(self, size: int, what: str) -> int:
        """How many things of at least so many bytes follow; there is room for them."""
        found: int = self.number("Q")
        if found * size > self.end - self.position:
            raise _DamagedError(f"{found:,} {what} at byte {self.position:,} run past byte {self.end:,}")
        return found

    def string(self) -> str:
        length = self.count(1, "bytes of a string")
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        number = self.number(_code(kind))
        # 1e-5 is stored as 9.99999975e-06: go back to the decimal that its author wrote.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number

    def array(self) -> list[str] | np.ndarray:
        kind = self.number("I")
        if kind == _STRING:
            return [self.string() for _ in range(self.count(8, "strings"))]
        if kind == _ARRAY:
            raise _DamagedError("an array of arrays, which llama.cpp does not read either")
        dtype = np.dtype("<" + _code(kind))
        count = self.count(dtype.itemsize, "numbers")
        start, self.position = self.position, self.position + count * dtype.itemsize
        return np.frombuffer(self.data[start : self.position], dtype)


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise _DamagedError(f"a value of type {kind}")
    return _SCALARS[kind]


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Args:
        path: a `.gguf` file, little-endian, version 2 or 3.

    Returns:
        Its metadata and tensor table. No weight is read.

    Raises:
        ModelError: the file is no GGUF file, is truncated or damaged, or is one part of a split model.
    """
    try:
        if not path.is_file():  # a directory, or a pipe that never ends
            raise FileNotFoundError("no such file")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError("A .gguf file must start with the bytes GGUF.", path, "Download it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Cursor(data))
    except OSError as error:
        raise ModelError(
            "A .gguf file must be readable.", *unread(path, error, "Check its place.")
        ) from error
    except _DamagedError as error:
        raise ModelError(
            "The header of a GGUF file must be complete and well formed.",
            f"{path}: {error}",
            "The file is truncated or damaged: download it again.",
        ) from error


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    version = cursor.number("I")
    if version not in (2, 3):
        raise ModelError(
            "GGUF versions 2 and 3, little-endian, can be read.",
            f"{path}: version {version}",
            "Convert the model again with a current llama.cpp.",
        )
    # The shortest key has 13 bytes, the shortest entry of the tensor table 32.
    tensor_count, key_count = cursor.count(32, "tensors"), cursor.count(13, "keys")
    if max(tensor_count, key_count) > _MAX_ENTRIES:
        raise _DamagedError(f"{tensor_count:,} tensors and {key_count:,} keys, more than {_MAX_ENTRIES:,}")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        _once(metadata, key := cursor.string(), "key")
        metadata[key] = cursor.value()
    rule = f"The metadata of a GGUF file must be of the types that its specification gives: {path}."
    general = checked(metadata, _General, rule, ModelError, REMEDY)
    if general.parts > 1:
        raise ModelError(
            "A GGUF model must be one file.",
            f"{path}: part of {general.parts} files",
            "Merge the parts with llama.cpp's `llama-gguf-split --merge`.",
        )
    if (alignment := general.alignment) & (alignment - 1):
        raise _DamagedError(f"general.alignment {alignment}, which is not a power of two")
    tensors: dict[str, TensorEntry] = {}
    for _ in range(tensor_count):
        _once(tensors, name := cursor.string(), "tensor")
        tensors[name] = _entry(name, cursor, alignment)
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: replace(entry, offset=start + entry.offset) for name, entry in tensors.items()}
    _check_places(tensors, len(cursor.data))
    return GGUFFile(path, metadata, tensors)


def _once(known: Mapping[str, Any], name: str, what: str) -> None:
    if name in known:
        raise _DamagedError(f"{what} {name!r} occurs twice")


def _entry(name: str, cursor: _Cursor, alignment: int) -> TensorEntry:
    """The next entry of the tensor table; its offset counts from the end of the header."""
    axes = cursor.number("I")
    if not 1 <= axes <= _MAX_AXES:
        raise _DamagedError(f"tensor {name!r} has {axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]  # stored innermost first
    number, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise _DamagedError(f"tensor {name!r} is of type {number}, which is unknown") from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise _DamagedError(f"tensor {name!r} of type {kind.name} has the shape {shape}")
    if offset % alignment:
        raise _DamagedError(f"tensor {name!r} begins at {offset}, which is not a multiple of {alignment}")
    return TensorEntry(shape, kind, offset, math.prod(shape) // block * block_bytes)


def _check_places(tensors: Mapping[str, TensorEntry], size: int) -> None:
    """Every tensor lies in the file, and none on the bytes of another."""
    places = sorted((entry.offset, entry.offset + entry.size, name) for name, entry in tensors.items())
    for (_, end, name), (start, _, following) in pairwise([*places, (size, size, "")]):
        if end > start:
            met = f"the beginning of {following!r}" if following else f"the end of the file, {size:,} bytes"
            raise _DamagedError(f"tensor {name!r} runs past {met}")
