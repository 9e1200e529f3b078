"""Weights in 4 bits as bitsandbytes writes them: two codes a byte, and a scale for the numbers of a block.

    w_i = round(v[code_i] · absmax_⌊i/b⌋),   i over all numbers of a tensor, row by row

v are the 16 values of nf4 or fp4, v · absmax is a product in float32, and it is rounded once, to the dtype
that the tensor had. Scales may be in 8 bits themselves (double quantisation), in float32:

    absmax_j = u[code_j] · absmax'_⌊j/b'⌋ + offset

Source: Dettmers et al. 2023, arXiv:2305.14314, §3 and appendix E.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from msgspec import Meta, Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.packed_weights import DAMAGED, Packed, PackedWeights, damaged
from hylorada_jax.text import parse_json, shown

_ABSMAX, _MAP, _STATE = ".absmax", ".quant_map", ".quant_state.bitsandbytes__"
_NESTED_ABSMAX, _NESTED_MAP = ".nested_absmax", ".nested_quant_map"
_VALUES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * n / 192 for sign in (1, -1) for n in (0, 1, 128, 192, 64, 96, 32, 48)),
}  # fmt: skip
_DTYPES = {"float32": ("F32", np.float32), "float16": ("F16", np.float16), "bfloat16": ("BF16", jnp.bfloat16)}
# What codes may be stored as (bnb_4bit_quant_storage), and how many bytes of them each element has.
_STORAGE = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
_WEIGHT = ".weight"
_MAX_STATE_BYTES = 4096
# Numbers that are made at a time: their float32 copies stay in a core's cache.
_RUN = 1 << 18
_RULE = (
    "A weight in bitsandbytes' 4 bits has two codes in a byte, and beside it .quant_state, which says "
    "its shape; .quant_map, the values of nf4 or fp4; .absmax, a scale for each block, in F32, or in U8 with "
    ".nested_absmax and .nested_quant_map."
)

Size = Annotated[int, Meta(ge=1, lt=2**31)]


class _State(Struct):
    """What the JSON beside a tensor says."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[Size, Size]
    nested_blocksize: Size | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return self.shape[0] * self.shape[1]

    @property
    def code_bytes(self) -> int:
        """How many bytes their codes are in."""
        return -(-self.count // 2)

    @property
    def blocks(self) -> int:
        """How many blocks they are in."""
        return -(-self.count // self.blocksize)


@lru_cache
def _pairs(quant_type: str) -> np.ndarray:
    """[byte]: both numbers, the first from the byte's upper half, as the bytes of one uint64."""
    values, byte = np.array(_VALUES[quant_type], np.float32), np.arange(256)
    return np.stack([values[byte >> 4], values[byte & 15]], axis=-1).view(np.uint64).reshape(-1)


def numbers(codes: np.ndarray, absmax: np.ndarray, quant_type: str, blocksize: int) -> np.ndarray:
    """The numbers of some blocks.

    Args:
        codes: [n / 2], bytes.
        absmax: [n / blocksize, rounded up], float32.
        quant_type: nf4 or fp4.
        blocksize: the numbers that share a scale.

    Returns:
        [n], float32.

    Example:
        >>> numbers(np.array([0x0F], np.uint8), np.array([2], np.float32), "nf4", 64).tolist()
        [-2.0, 2.0]
    """
    values = np.take(_pairs(quant_type), codes).view(np.float32)
    values *= np.repeat(absmax, blocksize)[: len(values)]
    return values


class BitsAndBytesWeights(PackedWeights):
    """The tensors of safetensors files; those in bitsandbytes' 4 bits in the dtype that they were made of.

    A tensor ``name`` is in the files as ``name`` [numbers / 2, 1] and, under names that begin with it, what
    its codes mean.

    Args:
        files: the file, or all shards.
        inside: as of :class:`~hylorada_jax.models.weights.SafetensorsWeights`.

    Raises:
        ModelError: as there; or what the files have of a tensor does not fit together.
    """

    def __init__(self, files: Sequence[Path], *, inside: bool = False) -> None:
        self._states: dict[str, _State] = {}
        self._units: dict[str, int] = {}
        self._scales: tuple[str, np.ndarray] = ("", np.empty(0, np.float32))
        super().__init__(files, inside=inside)

    def packed(self) -> Iterator[Packed]:
        """The weights of bytes, and those of which there is more than themselves."""
        beside: dict[str, list[str]] = {}
        for name in self.shapes:
            owner, found, _ = name.rpartition(f"{_WEIGHT}.")
            if found:
                beside.setdefault(owner + _WEIGHT, []).append(name)
            elif name.endswith(_WEIGHT) and self.dtypes[name] == "U8":
                beside.setdefault(name, [])
        for name, parts in beside.items():
            self._states[name] = state = self._checked(name, parts)
            self._units[name] = _STORAGE[self.dtypes[name]]
            yield Packed(name, (name, *parts), state.shape, _DTYPES[state.dtype][0])

    def _checked(self, name: str, parts: Sequence[str]) -> _State:
        """The state of a tensor, all of whose parts are what it says."""
        state_name = next((part for part in parts if part.startswith(name + _STATE)), name + _STATE + "nf4")
        state = self._state(state_name)
        scales = "F32" if state.nested_blocksize is None else "U8"
        storage = self.dtypes.get(name, "")
        if storage not in _STORAGE or state.code_bytes % _STORAGE[storage]:
            storage = "U8"
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (storage, (state.code_bytes // _STORAGE[storage], 1)),
            name + _ABSMAX: (scales, (state.blocks,)),
            name + _MAP: ("F32", (16,)),
            name + _STATE + state.quant_type: ("U8", self.shapes[state_name]),
        }
        if state.nested_blocksize is not None:
            expected[name + _NESTED_ABSMAX] = ("F32", (-(-state.blocks // state.nested_blocksize),))
            expected[name + _NESTED_MAP] = ("F32", (256,))
        found = self.described((name, *parts))
        wrong = [
            f"{own}: {_said(found.get(own))} instead of {_said(expected.get(own))}"
            for own in {**expected, **found}
            if found.get(own) != expected.get(own)
        ]
        if wrong:
            raise damaged(_RULE, "; ".join(wrong))
        values = self.stored(name + _MAP)
        if not np.array_equal(values, np.array(_VALUES[state.quant_type], np.float32)):
            where = f"{name + _MAP} in {self.file_of(name + _MAP)}"
            raise damaged(_RULE, f"{where}: {shown(values.tolist())}, not those of {state.quant_type}")
        return state

    def _state(self, name: str) -> _State:
        dtype, shape = self.dtypes.get(name), self.shapes.get(name, ())
        if dtype != "U8" or len(shape) != 1 or shape[0] > _MAX_STATE_BYTES:
            raise damaged(_RULE, f"{name}: {_said((dtype, shape) if dtype else None)} instead of U8")
        where = f"{name} in {self.file_of(name)}"
        try:
            said = parse_json(self.stored(name).tobytes().decode())
        except ValueError as error:
            raise damaged(_RULE, f"{where}: {error}") from error
        state = checked(said, _State, _RULE, ModelError, DAMAGED, where)
        if (state.nested_blocksize is None) != (state.nested_offset is None):
            raise damaged(_RULE, f"{where}: nested_blocksize and nested_offset, one without the other")
        return state

    def numbers_of(self, name: str, own: Sequence[range]) -> np.ndarray:
        """A part of a tensor in 4 bits, made some rows at a time."""
        rows, columns = own
        state, absmax = self._states[name], self._absmax(name)
        size, width, unit = state.blocksize, state.shape[1], self._units[name]

        def blocks(start: int, stop: int) -> slice:
            """Those with the numbers of some rows, which may begin and end inside of one."""
            return slice(start * width // size, -(-stop * width // size))

        here = blocks(rows.start, rows.stop)
        part = slice(here.start * size // 2 // unit, min(here.stop * size // 2, state.code_bytes) // unit)
        codes = self.stored(name, (part,)).reshape(-1).view(np.uint8)
        values = np.empty((len(rows), len(columns)), _DTYPES[state.dtype][1])
        step = max(1, _RUN // width)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            own_blocks = blocks(start, stop)
            first, last = ((at - here.start) * size // 2 for at in (own_blocks.start, own_blocks.stop))
            run = numbers(codes[first:last], absmax[own_blocks], state.quant_type, size)
            run = run[start * width - own_blocks.start * size :][: (stop - start) * width]
            run = run.reshape(-1, width)[:, columns.start : columns.stop]
            # Whoever reads the tensor reports what is infinite, with its name.
            with np.errstate(over="ignore"):
                values[start - rows.start : stop - rows.start] = run
        return values

    def _absmax(self, name: str) -> np.ndarray:
        """[blocks], float32; kept until another tensor's are asked for, as a tensor is read in parts."""
        if self._scales[0] != name:
            self._scales = name, self._made_absmax(name)
        return self._scales[1]

    def _made_absmax(self, name: str) -> np.ndarray:
        state, stored = self._states[name], self.stored(name + _ABSMAX)
        if state.nested_offset is None or state.nested_blocksize is None:
            return stored
        # Not by np.repeat: a block may be said to have 2³¹ scales, whatever there are.
        scales = self.stored(name + _NESTED_ABSMAX)[np.arange(state.blocks) // state.nested_blocksize]
        return self.stored(name + _NESTED_MAP)[stored] * scales + np.float32(state.nested_offset)


def _said(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "{} {}".format(*tensor) if tensor else "nothing"
