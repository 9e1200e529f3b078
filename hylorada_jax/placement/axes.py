"""The axes of a mesh, and how a user writes one. Imports no jax, so that settings are checked at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from hylorada_jax.errors import ConfigError

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
"""Copies of the model; shares of its weights, gathered to compute; shares of its heads and of its MLPs."""

ROWS = (DATA, FSDP)
"""The axes that divide the rows of a batch."""

Axis = str | tuple[str, ...] | None
"""What one axis of an array is cut over: an axis of the mesh, several, or none."""

_RULE = f"A mesh must be sizes of the axes {', '.join(AXES)}, each named at most once."


def mesh_sizes(text: str, devices: int | None = None) -> dict[str, int]:
    """The sizes that a user's mesh names, or those of all axes.

    Args:
        text: such as "fsdp=8,tensor=2".
        devices: how many there are; what they leave goes to data. None: the sizes are given as they stand.

    Returns:
        {axis: size}.

    Raises:
        ConfigError: an axis is unknown or named twice, a size is not a positive integer, or the sizes do not
            multiply to the devices.

    Example:
        >>> mesh_sizes("fsdp=4,tensor=2", devices=16)
        {'data': 2, 'fsdp': 4, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9][0-9]{0,6})\s*", part, re.ASCII)
        if found is None or found[1] not in AXES or found[1] in sizes:
            raise ConfigError(_RULE, f"{part.strip()!r} in mesh {text!r}", "Write it as fsdp=8,tensor=2.")
        sizes[found[1]] = int(found[2])
    if devices is None:
        return sizes
    named = math.prod(sizes.values())
    if devices % named or (DATA in sizes and named != devices):
        raise ConfigError(
            "The sizes of a mesh must multiply to the number of devices; data, unless named, takes the rest.",
            f"mesh {text!r} on {devices} devices",
            "Choose sizes whose product divides them, and leave data out.",
        )
    return {DATA: devices // named, FSDP: 1, TENSOR: 1} | sizes


def leaves_room(held: int, memory: int | None) -> bool:
    """Whether a device can train beside what it holds: half of its memory is for what a step takes.

    Args:
        held: bytes.
        memory: bytes that the device has; None where it does not say, which is taken for enough.

    Example:
        >>> leaves_room(15 * 2**30, 16 * 2**30)
        False
    """
    return memory is None or held <= memory / 2


def dividing(
    axes: tuple[Axis, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """For each axis of an array, those of a mesh's axes that cut it: the first ones that divide it.

    Args:
        axes: what the array is meant to be cut over; axes that the mesh does not have count as 1.
        shape: of the array.
        sizes: of the mesh.

    Example:
        >>> dividing((("fsdp", "tensor"), None), (12, 5), {"fsdp": 4, "tensor": 2})
        (('fsdp',), ())
    """
    cuts = []
    for names, length in zip(axes, shape, strict=True):
        taken: tuple[str, ...] = ()
        for name in (names,) if isinstance(names, str) else names or ():
            size = sizes.get(name, 1)
            if length % size:
                break
            taken, length = (*taken, name) if size > 1 else taken, length // size
        cuts.append(taken)
    return tuple(cuts)
