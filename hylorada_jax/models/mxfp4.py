"""Weights of experts in MXFP4, as OpenAI publishes gpt-oss: two numbers a byte, and a power of two for 32.

    w_i = v[code_i] · 2^(scale_⌊i/32⌋ − 127),   v = 0, ½, 1, 1½, 2, 3, 4, 6, and the same below zero

Each is a bfloat16 number without rounding.

Source: Open Compute Project, OCP Microscaling Formats (MX) Specification, 2023, §5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from hylorada_jax.models.packed_weights import Packed, PackedWeights, damaged

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = np.array(_MAGNITUDES + [-magnitude for magnitude in _MAGNITUDES], np.float32)
# Rows of a tensor that are turned over at a time: what they take stays in a core's cache.
_ROWS = 64


@lru_cache
def _pairs() -> np.ndarray:
    """[scale · 256 + byte]: both numbers, the first from the byte's lower half, as the bytes of one uint32.

    A table, for to compute what a 20B model has takes minutes.
    """
    of_byte = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
    powers = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
    with np.errstate(over="ignore"):  # whoever reads the tensor reports what is infinite, with its name
        return (powers[:, None, None] * of_byte).astype(jnp.bfloat16).view(np.uint32).reshape(-1)


def numbers(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers of a tensor.

    Args:
        blocks: [..., groups, 16], bytes.
        scales: [..., groups], bytes.

    Returns:
        [..., 32·groups] in bfloat16; NaN where a scale is 255.

    Example:
        >>> numbers(np.full((1, 16), 0x2F, np.uint8), np.array([128], np.uint8))[:2].tolist()
        [-12.0, 2.0]
    """
    pairs = np.take(_pairs(), (scales.astype(np.uint16) << 8)[..., None] | blocks)
    return pairs.reshape(*scales.shape[:-1], -1).view(jnp.bfloat16)


class MXFP4Weights(PackedWeights):
    """The tensors of safetensors files; those in MXFP4 as [experts, inputs, outputs], in bfloat16.

    A tensor ``name`` is in the files as ``name_blocks`` [experts, outputs, inputs / 32, 16] and
    ``name_scales`` [experts, outputs, inputs / 32].

    Args:
        files: the file, or all shards.
        inside: as of :class:`~hylorada_jax.models.weights.SafetensorsWeights`.

    Raises:
        ModelError: as there; or of a tensor in MXFP4 there are not both parts, of fitting shapes and bytes,
            or it is there as numbers too.
    """

    def packed(self) -> Iterator[Packed]:
        """The tensors with blocks or scales."""
        ends = (_BLOCKS, _SCALES)
        names = dict.fromkeys(n.removesuffix(end) for n in self.shapes for end in ends if n.endswith(end))
        for name in names:
            parts = (name + _BLOCKS, name + _SCALES)
            self._check(name, parts)
            experts, outputs, groups = self.shapes[parts[1]]
            yield Packed(name, parts, (experts, groups * _GROUP, outputs), "BF16")

    def _check(self, name: str, parts: Sequence[str]) -> None:
        found = self.described((name, *parts))
        scales = found.get(parts[1], ("", ()))[1]
        if len(scales) != 3 or found != {parts[0]: ("U8", (*scales, _GROUP // 2)), parts[1]: ("U8", scales)}:
            raise damaged(
                f"A tensor in MXFP4 has {_BLOCKS} [experts, outputs, groups, {_GROUP // 2}] and {_SCALES} "
                "[experts, outputs, groups], both of bytes (U8), and is not there as numbers too.",
                "; ".join(f"{own}: {dtype} {shape}" for own, (dtype, shape) in found.items()),
            )

    def numbers_of(self, name: str, own: Sequence[range]) -> np.ndarray:
        """A part of a tensor in MXFP4, made expert by expert."""
        experts, inputs, outputs = own
        values = np.empty([len(axis) for axis in own], jnp.bfloat16)
        for target, expert in zip(values, experts, strict=True):
            where = slice(expert, expert + 1), slice(outputs.start, outputs.stop)
            blocks, scales = (self.stored(name + end, where)[0] for end in (_BLOCKS, _SCALES))
            for at in range(0, len(outputs), _ROWS):
                rows = slice(at, at + _ROWS)
                target[:, rows] = numbers(blocks[rows], scales[rows])[:, inputs.start : inputs.stop].T
        return values
