"""The header of a GGUF file: its metadata and where each tensor lies.

Parsed here with ``struct``, because the reader of the gguf package makes an array per string and takes
seconds on a vocabulary.

Reference: the GGUF specification, version 3.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hylorada_jax.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
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
    """The header of a GGUF file: its metadata and the place of each tensor, no weights."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


class _Cursor:
    """Reads little-endian values one after the other from a mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise struct.error("a string runs past the end of the file")
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            return [self.value(item) for _ in range(count)]
        number = self.number(_SCALARS[kind])
        # 1e-5 is stored as 9.99999975e-06: go back to the decimal that its author wrote.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Args:
        path: a `.gguf` file, little-endian, version 2 or 3.

    Returns:
        Its metadata and tensor table. No weight is read.

    Raises:
        ModelError: the file is no GGUF file, is truncated, or is one part of a split model.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("A .gguf file must start with the bytes GGUF.", path, "Download it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data))
            except (struct.error, KeyError, ValueError, OverflowError) as error:
                raise ModelError(
                    "The header of a GGUF file must be complete and well formed.",
                    f"{path} ({len(data)} bytes): {error}",
                    "The file is truncated or damaged: download it again.",
                ) from error


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    cursor.position = 4
    version = cursor.number("I")
    if version not in (2, 3):
        raise ModelError(
            "GGUF versions 2 and 3, little-endian, can be read.",
            f"{path}: version {version}",
            "Convert the model again with a current llama.cpp.",
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            "A GGUF model must be one file.",
            f"{path}: part of {metadata['split.count']} files",
            "Merge the parts with llama.cpp's `llama-gguf-split --merge`.",
        )
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]  # stored innermost first
        table.append((name, shape, GGMLQuantizationType(cursor.number("I")), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        tensors[name] = TensorEntry(shape, kind, start + offset, int(np.prod(shape)) // block * block_bytes)
        if start + offset + tensors[name].size > len(cursor.data):
            raise ValueError(f"tensor {name} runs past the end of the file")
    return GGUFFile(path, metadata, tensors)
