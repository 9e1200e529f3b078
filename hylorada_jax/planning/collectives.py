"""What the devices of a compiled program send each other, every loop counted as often as it runs."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from hylorada_jax.planning.hlo_cost import called, executions, parsed

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# XLA numbers the results where there are many: /*index=5*/.
_OPERATION = re.compile(rf" = ((?:index=|[^=\n])*?) ({'|'.join(KINDS)})(-start)?\(([^\n]*)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_TILES = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_LISTS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class Collective(NamedTuple):
    """One operation of a program.

    Attributes:
        kind: of ``KINDS``.
        shapes: of what it gives.
        sent: bytes that a device sends, by the algorithm that sends least.
        runs: how often.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sent: float
    runs: float


def collectives(text: str, turns: float | None = None) -> list[Collective]:
    """The collectives of an optimized HLO program.

        all-gather, all-to-all: (n−1)/n · result;   reduce-scatter: (n−1) · result
        all-reduce: 2 · (n−1)/n · result;   collective-permute: result        n devices in a group

    A TPU's compiler writes one that overlaps with other work several times, under one channel, also into
    loops that run meanwhile: it is counted once where it begins, outside of them. Of a choice between two
    computations the one that sends less is counted: in a step these are rows of weights that an update all
    but removes.

    Args:
        text: from ``jax.stages.Compiled.as_text``.
        turns: as for :func:`hylorada_jax.planning.hlo_cost.program_cost`.
    """
    entry, computations = parsed(text)
    found: dict[str, Collective] = {}
    for name, runs in executions(entry, computations, turns).items():
        for channel, each in _within(name, computations).items():
            if channel not in found or runs < found[channel].runs:
                found[channel] = each._replace(runs=runs)
    return [*found.values()]


def sent_bytes(found: list[Collective]) -> dict[str, float]:
    """The bytes that each device sends, by kind; of the kinds that there are."""
    return {kind: total for kind in KINDS if (total := sum(c.sent * c.runs for c in found if c.kind == kind))}


def _within(name: str, computations: Mapping[str, str]) -> dict[str, Collective]:
    """Those of one run of a computation, without its loops, by channel."""
    channels: dict[str, Collective] = {}
    pending, seen = [name], {name}
    while pending:
        block = computations[pending.pop()]
        for number, line in enumerate(block.splitlines()):
            if operation := _OPERATION.search(line):
                channel = _CHANNEL.search(line)
                channels.setdefault(channel[1] if channel else f"{block[:80]} {number}", _read(operation))
            elif " while(" not in line:
                callees = [*called(line)]
                if " conditional(" in line:
                    callees = [min(callees, key=lambda callee: _sent(callee, computations))]
                pending += [callee for callee in callees if callee not in seen]
                seen |= {*callees}
    return channels


def _sent(name: str, computations: Mapping[str, str]) -> float:
    return sum(each.sent for each in _within(name, computations).values())


def _read(operation: re.Match[str]) -> Collective:
    result, kind, starts, rest = operation.groups()
    arrays = [
        (int(bits or 8) / 8, tuple(int(n) for n in shape.split(",") if n))
        for _, bits, shape in _ARRAY.findall(result)
    ]
    if starts and kind in ("all-gather", "collective-permute"):  # its operands stand before what it gives
        arrays = [max(arrays, key=lambda array: array[0] * math.prod(array[1]))]
    given = sum(width * math.prod(shape) for width, shape in arrays)
    n = _group(rest)
    sent = {
        "all-gather": given * (n - 1) / n,
        "all-to-all": given * (n - 1) / n,
        "reduce-scatter": given * (n - 1),
        "all-reduce": 2 * given * (n - 1) / n,
        "collective-permute": given,
    }[kind]
    return Collective(kind, tuple(shape for _, shape in arrays), sent, 1)


def _group(attributes: str) -> int:
    """How many devices take part, as XLA writes it in three ways."""
    if mesh := _MESH.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if tiles := _TILES.search(attributes):
        return int(tiles[1])
    lists = _LISTS.search(attributes)
    return lists[1].count(",") + 1 if lists else 1
