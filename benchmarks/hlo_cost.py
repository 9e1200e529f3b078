"""The cost of a compiled program, with every loop counted as often as it runs."""

import re
from typing import NamedTuple

import jax
from jaxlib import _hlo, _jax  # type: ignore[attr-defined]

from hylorada_jax.errors import DataError

_WHILE = re.compile(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|computations?)=\{?%([\w.-]+)((?:, %[\w.-]+)*)")


class Cost(NamedTuple):
    """What one run of a program takes.

    Args:
        flops: floating-point operations.
        bytes_accessed: what its operations read and write, in any memory, without the padding of tiles.
    """

    flops: float
    bytes_accessed: float


def program_cost(text: str, *, row_blocks: int = 1) -> Cost:
    """The cost of an optimized HLO program.

        cost(C) = xla(C) + Σ_{while w in C} (trips_w · cost(body_w) − xla(body_w))

    XLA's own analysis counts the body of a loop once, and so a model under ``nn.scan`` as one layer.

    Args:
        text: from ``jax.stages.Compiled.as_text``.
        row_blocks: in how many blocks attention cuts a row. Its loop over them begins and ends where the
            row's own numbers say; it is counted as in a causal row without padding, where it runs
            (row_blocks + 1) / 2 times on average. Of two branches the dearer one counts.

    Returns:
        The cost on one device.

    Raises:
        DataError: it cannot be read off how often a loop runs.
    """
    # Metadata names places in the source, which the parser misses in a part of a program.
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    blocks = {found[2]: found[0] for found in re.finditer(r"^(ENTRY )?%([\w.-]+) .*?^}", text, re.M | re.S)}
    (entry,) = (name for name, block in blocks.items() if block.startswith("ENTRY"))
    computations = {name: block.removeprefix("ENTRY ") for name, block in blocks.items()}
    reached = 0

    def cost(name: str) -> Cost:
        nonlocal reached
        flops, moved = _xla_cost(name, computations)
        for condition, body in _WHILE.findall(computations[name]):
            reached += 1
            trips = _trips(computations[condition], (row_blocks + 1) / 2)
            once, all_of_it = _xla_cost(body, computations), cost(body)
            flops += trips * all_of_it.flops - once.flops
            moved += trips * all_of_it.bytes_accessed - once.bytes_accessed
        return Cost(flops, moved)

    total = cost(entry)
    if reached != (loops := text.count(" while(")):
        raise DataError(
            "Every loop of the program is run by its entry, or by the body of such a loop.",
            f"{reached} of {loops} loops",
            "Let program_cost follow the operation that runs the others.",
        )
    return total


def _trips(condition: str, from_data: float) -> float:
    """How often a loop runs that counts from 0: its condition compares the counter with the one constant.

    Where it compares two numbers of its state, ``from_data`` times.
    """
    limits = re.findall(r" constant\((\d+)\)", condition)
    if len(limits) > 1 or "direction=LT" not in condition:
        raise DataError(
            "A loop's condition is `counter < constant`, or `counter < limit`.",
            condition,
            "Let program_cost read this one too.",
        )
    return int(limits[0]) if limits else from_data


def _xla_cost(name: str, computations: dict[str, str]) -> Cost:
    """What XLA says of a computation, as the entry of a program of its own."""
    needed: dict[str, None] = {}  # an ordered set, callees first

    def visit(name: str) -> None:
        if name not in needed:
            for first, others in _CALLED.findall(computations[name]):
                for callee in [first, *re.findall(r"%([\w.-]+)", others)]:
                    visit(callee)
            needed[name] = None

    visit(name)
    blocks = [("ENTRY " if block == name else "") + computations[block] for block in needed]
    module = _hlo.hlo_module_from_text("\n\n".join(["HloModule part", *blocks]))
    found = _jax.hlo_module_cost_analysis(jax.devices()[0].client, module)
    return Cost(found["flops"], found["bytes accessed"])
