"""The cost of a compiled program, with every loop counted as often as it runs, and every kernel for a TPU."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from jaxlib import _hlo, _jax  # type: ignore[attr-defined]

from hylorada_jax.errors import DataError

_WHILE = re.compile(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|computations?)=\{?%([\w.-]+)((?:, %[\w.-]+)*)")
_CONDITIONAL = re.compile(r" conditional\(.*, (?:branch|true)_computations?=([^\n]*)")
# A copy between a TPU's memories, which other operations may overlap.
_STARTED = re.compile(r"^ *%([\w.-]+) = .* (copy|slice)-start\((%[\w.-]+)\)(, slice=\{.*?\})?.*\n", re.M)
_OVERLAPPED = 'frontend_attributes={overlapped="1"}'
_COPIED = re.compile(rf" = (?:s|u|f|bf)(\d+)\[([\d,]+)\].*{re.escape(_OVERLAPPED)}")
_DONE = re.compile(r" (?:copy|slice)-done\(%([\w.-]+)\).*")
_KERNEL = re.compile(r'%([\w.-]+) = ([^\n]*) custom-call\([^\n]*custom_call_target="tpu_custom_call"[^\n]*')
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
# What splash_attention names the calls of jax's kernel; with its own name for each of three kernels.
_SPLASH = re.compile(r"\b(\d+)_blocks_of_(\d+)\b.*/splash_mha_(fwd|dq|dkv)\w*/pallas_call")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_ARRAY = re.compile(r"\b(s|u|f|bf)(\d+)\[([\d,]+)\]")


class Cost(NamedTuple):
    """What one run of a program takes.

    Args:
        flops: floating-point operations.
        bytes_accessed: what its operations read and write, in any memory, without the padding of tiles.
        copied_bytes: of these, what the compiler has copied from one memory of a TPU to another while other
            operations run: where there is room, so that it differs between programs that compute the same.
    """

    flops: float
    bytes_accessed: float
    copied_bytes: float = 0.0


def program_cost(text: str, turns: float | None = None) -> Cost:
    """The cost of an optimized HLO program.

        cost(C) = xla(C) + Σ_{while w in C} (trips_w · cost(body_w) − xla(body_w))

    XLA's own analysis counts the body of a loop once, and so a model under ``nn.scan`` as one layer; a copy
    that begins and ends apart, twice; and of a conditional the branch that costs most, where here the least
    is counted: ours have another formula for what all but never happens (``math/adapted_norm.py``). Of a
    kernel for a TPU it knows nothing: what the kernel states is counted, and of jax's splash attention, which
    states nothing, the products of the blocks that it goes through, and what it reads and writes for them.

    Args:
        text: from ``jax.stages.Compiled.as_text``.
        turns: how often a loop runs that counts to a number which depends on the data; None refuses one.

    Returns:
        The cost on one device.

    Raises:
        DataError: it cannot be read off how often a loop runs, or what a kernel costs.
    """
    kernels = {found[1]: _kernel_cost(found[0], found[2]) for found in _KERNEL.finditer(_readable(text))}
    entry, computations = parsed(text)

    @functools.cache
    def xla(name: str) -> Cost:
        return _xla_cost(name, computations)

    flops = moved = copied = 0.0
    for name, runs in executions(entry, computations, turns).items():
        own_flops, own_moved, _ = xla(name)
        for kernel in _KERNEL.finditer(computations[name]):
            # −1 stands for what XLA does not know.
            own_flops += kernels[kernel[1]].flops + 1
            own_moved += kernels[kernel[1]].bytes_accessed + 1
        for branches in _CONDITIONAL.findall(computations[name]):
            costs = [xla(branch) for branch in re.findall(r"%([\w.-]+)", branches)]
            branch_flops, branch_moved, _ = zip(*costs, strict=True)
            own_flops += min(branch_flops) - max(branch_flops)
            own_moved += min(branch_moved) - max(branch_moved)
        for _, body in _WHILE.findall(computations[name]):
            own_flops -= xla(body).flops
            own_moved -= xla(body).bytes_accessed
        for bits, shape in _COPIED.findall(computations[name]):
            copied += runs * 2 * int(bits) // 8 * math.prod(map(int, shape.split(",")))
        flops, moved = flops + runs * own_flops, moved + runs * own_moved
    return Cost(flops, moved, copied)


def parsed(text: str) -> tuple[str, dict[str, str]]:
    """The name of a program's entry, and its computations by name, as text."""
    # Metadata names places in the source, which the parser misses in a part of a program.
    text = re.sub(r", metadata=\{[^}]*\}", "", _readable(text))
    started = {found[1]: f"{found[2]}({found[3]}){found[4] or ''}" for found in _STARTED.finditer(text)}
    text = _DONE.sub(lambda done: f" {started[done[1]]}, {_OVERLAPPED}", _STARTED.sub("", text))
    blocks = {found[2]: found[0] for found in re.finditer(r"^(ENTRY )?%([\w.-]+) .*?^}", text, re.M | re.S)}
    (entry,) = (name for name, block in blocks.items() if block.startswith("ENTRY"))
    return entry, {name: block.removeprefix("ENTRY ") for name, block in blocks.items()}


def executions(entry: str, computations: Mapping[str, str], turns: float | None) -> dict[str, float]:
    """How often the entry of a program, and the body of each of its loops, runs.

    Raises:
        DataError: it cannot be read off how often a loop runs.
    """
    runs: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        runs[name] = runs.get(name, 0) + times
        for condition, body in _WHILE.findall(computations[name]):
            visit(body, times * _trips(computations[condition], computations[body], turns))

    visit(entry, 1)
    bodies = {body for block in computations.values() for _, body in _WHILE.findall(block)}
    if missed := bodies - runs.keys():
        raise DataError(
            "Every loop of the program is run by its entry, or by the body of such a loop.",
            f"{len(missed)} of {len(bodies)} loops",
            "Let program_cost follow the operation that runs the others.",
        )
    return runs


def called(text: str) -> Iterator[str]:
    """The names of the computations that a part of a program calls, those of its loops too."""
    for first, others in _CALLED.findall(text):
        yield from (first, *re.findall(r"%([\w.-]+)", others))


def _readable(text: str) -> str:
    """Without what pallas notes at a kernel over several lines, whose end the parser misses."""
    return re.sub(r", frontend_attributes=\{kernel_metadata=\{.*?\}\}", "", text, flags=re.S)


def _kernel_cost(call: str, outputs: str) -> Cost:
    """What a kernel for a TPU states, or jax's splash attention does."""
    if stated := _STATED.search(call):
        return Cost(float(stated[1]), float(stated[2]))
    if 'op_name="ragged-dot-metadata"' in call:  # some whole numbers: where a ragged product's tiles lie
        return Cost(0, 0)
    called = _SPLASH.search(call)
    if called is None:
        raise DataError(
            "A kernel for a TPU states its cost.", call[:200], "Give its pallas_call a cost_estimate."
        )
    blocks, size, products = int(called[1]), int(called[2]), _PRODUCTS[called[3]]
    operands = call.partition("operand_layout_constraints=")[2].partition("}}")[0]
    arrays = [
        (kind, int(bits) // 8, [int(n) for n in shape.split(",")])
        for kind, bits, shape in _ARRAY.findall(operands + outputs)
    ]
    once = sum(width * math.prod(shape) for _, width, shape in arrays)
    # The queries, [rows, heads, seq, head_dim], are the first that are no whole numbers.
    width, (*heads, _, dim) = next(array[1:] for array in arrays if array[0] in ("f", "bf"))
    steps = math.prod(heads) * blocks
    # For a block of queries two of keys and values are fetched anew, or the other way round.
    return Cost(2 * products * steps * size**2 * dim, once + 2 * width * steps * size * dim)


def _trips(condition: str, body: str, turns: float | None) -> float:
    """How often a loop runs that counts from 0: its condition compares the counter with a limit."""
    limits = re.findall(r" constant\((\d+)\)", condition)
    if "direction=LT" in condition and len(limits) == 1:
        return math.ceil(int(limits[0]) / _growth(condition, body))
    if "direction=LT" in condition and not limits and turns is not None:
        return turns
    raise DataError(
        "A loop's condition must be `counter < constant`, or `turns` be given for a limit that the data set.",
        condition,
        "Let program_cost read this one too.",
    )


def _growth(condition: str, body: str) -> int:
    """What a loop's counter grows by: 1, or more where XLA has put several turns into one."""
    counter = re.search(r" compare\(%([\w.-]+),", condition)
    place = counter and re.search(rf"%{re.escape(counter[1])} = .*, index=(\d+)", condition)
    given = re.search(r"ROOT .* tuple\((.*)\)", body)
    if place and given:
        grown = re.findall(r"%([\w.-]+)", given[1])[int(place[1])]
        by = re.search(rf"%{re.escape(grown)} = .* add\(%[\w.-]+, %([\w.-]+)\)", body)
        number = by and re.search(rf"%{re.escape(by[1])} = .* constant\((\d+)\)", body)
        if number:
            return int(number[1])
    return 1


def _xla_cost(name: str, computations: Mapping[str, str]) -> Cost:
    """What XLA says of a computation, as the entry of a program of its own."""
    needed: dict[str, None] = {}  # an ordered set, callees first

    def visit(name: str) -> None:
        if name not in needed:
            for callee in called(computations[name]):
                visit(callee)
            needed[name] = None

    visit(name)
    blocks = [("ENTRY " if block == name else "") + computations[block] for block in needed]
    module = _hlo.hlo_module_from_text("\n\n".join(["HloModule part", *blocks]))
    found = _jax.hlo_module_cost_analysis(jax.devices()[0].client, module)
    return Cost(found.get("flops", 0.0), found.get("bytes accessed", 0.0))  # it names what there is
