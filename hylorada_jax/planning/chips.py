"""TPUs that can be rented: what one chip of each has."""

import math
import re
from typing import NamedTuple

from hylorada_jax.errors import ConfigError


class Chip(NamedTuple):
    """One chip.

    Attributes:
        kind: JAX's name of such a device.
        axes: dimensions of a topology.
        memory: bytes of HBM.
        flops: products and sums of bfloat16 numbers per second, at most.
        bandwidth: bytes per second between HBM and the chip.
        links: bytes per second that it sends other chips, by all of its links.
    """

    kind: str
    axes: int
    memory: int
    flops: float
    bandwidth: float
    links: float


# Source: docs.cloud.google.com/tpu/docs/v5e, …/v5p and …/v6e, "key specifications", 2026. A chip
# sends at one half of the bidirectional bandwidth that stands there.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 2, 16 * 2**30, 197e12, 0.82e12, 200e9),
    "v5p": Chip("TPU v5", 3, 95 * 2**30, 459e12, 2.765e12, 600e9),
    "v6e": Chip("TPU v6 lite", 2, 32 * 2**30, 918e12, 1.64e12, 400e9),
}


def parse_topology(text: str) -> tuple[Chip, int]:
    """The chip of a topology, and how many there are.

    Args:
        text: such as "v5e:4x4", chips along each axis.

    Raises:
        ConfigError: the chip is unknown, or has another number of axes.

    Example:
        >>> parse_topology("v5p:2x2x4")[1]
        16
    """
    found = re.fullmatch(r"(\w+):([1-9]\d{0,2}(?:x[1-9]\d{0,2})*)", text, re.ASCII)
    sides = [int(side) for side in found[2].split("x")] if found else []
    if found is None or found[1] not in CHIPS or len(sides) != CHIPS[found[1]].axes:
        shapes = (f"{name}:{'x'.join('2' * chip.axes)}" for name, chip in CHIPS.items())
        raise ConfigError(
            f"A topology must be a chip and its numbers along each axis, as {', '.join(shapes)}; or 'here'.",
            repr(text),
            "Write it as v5e:4x4.",
        )
    return CHIPS[found[1]], math.prod(sides)


def chip_of_kind(kind: str) -> Chip | None:
    """The chip that JAX names so; None of what is none of these."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
