"""Safetensors files whose tensors are in part codes: each of these is several tensors there, and one here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hylorada_jax.errors import ModelError
from hylorada_jax.models.weights import Part, SafetensorsWeights

DAMAGED = "The checkpoint is damaged, or two are in one directory: download it again."


class Packed(NamedTuple):
    """A tensor that is in the files as codes.

    Attributes:
        name: of the tensor.
        parts: the names of what the files have of it; its codes first.
        shape: of the numbers.
        dtype: of the numbers, as safetensors writes it.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


class PackedWeights(SafetensorsWeights):
    """The tensors of safetensors files, those that are codes as the numbers that they stand for.

    A subclass says which those are, from headers and what is small, and makes the numbers of one.

    Args:
        files: the file, or all shards.
        inside: as of :class:`~hylorada_jax.models.weights.SafetensorsWeights`.

    Raises:
        ModelError: as there; or what the files have of a tensor does not fit together.
    """

    def __init__(self, files: Sequence[Path], *, inside: bool = False) -> None:
        super().__init__(files, inside=inside)
        self._codes: dict[str, str] = {}
        for packed in [*self.packed()]:
            self._codes[packed.name] = packed.parts[0]
            for part in packed.parts:
                del self.shapes[part], self.dtypes[part]
            self.shapes[packed.name], self.dtypes[packed.name] = packed.shape, packed.dtype

    @abstractmethod
    def packed(self) -> Iterator[Packed]:
        """The tensors that are codes; a ModelError for parts that do not fit together."""

    @abstractmethod
    def numbers_of(self, name: str, own: Sequence[range]) -> np.ndarray:
        """The numbers of such a tensor at some places along each of its axes."""

    def described(self, names: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtypes and shapes of those tensors that are in the files."""
        return {name: (self.dtypes[name], self.shapes[name]) for name in names if name in self.shapes}

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, or its codes."""
        return super().file_of(self._codes.get(name, name))

    def read(self, name: str, part: Part = ()) -> np.ndarray:
        """One tensor, or the bytes of a part of it alone."""
        if name not in self._codes:
            return super().read(name, part)
        return self.numbers_of(
            name, [range(n)[cut or slice(None)] for n, cut in zip_longest(self.shapes[name], part)]
        )


def damaged(rule: str, received: object) -> ModelError:
    """The error for codes that do not fit together."""
    return ModelError(rule, received, DAMAGED)
