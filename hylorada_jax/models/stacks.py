"""Which layers of our decoder lie in one stack of parameters, and in which order the stacks run.

Layers of one shape are one stack, [layers, …], and one loop. Where shapes differ, the layers are cut into
parts, in each of which a pattern repeats: five layers of one kind and one of another, ten times. Those of a
kind that follow each other in the pattern are a stack, of all its repeats. So the program has the size of the
patterns, whatever the depth, and no weight is copied to be run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple

from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.trees import TreePath

LAYERS = ("model", "layers")
"""Where the layers are in the parameter tree."""


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, whose parameters lie along one axis.

    Attributes:
        index: its place among all stacks.
        path: of its parameters in the tree.
        config: of a model of these layers alone.
        numbers: the layers' own, in the order of the axis.
        together: how many of them follow each other in one repeat of the pattern.
    """

    index: int
    path: TreePath
    config: DecoderConfig
    numbers: tuple[int, ...]
    together: int


class Part(NamedTuple):
    """Layers that follow each other: the stacks of a pattern, which is repeated."""

    repeats: int
    stacks: tuple[Stack, ...]


@cache
def parts_of(config: DecoderConfig) -> tuple[Part, ...]:
    """The parts of a decoder's layers, in order."""
    kinds = [config.kind(number) for number in range(config.num_hidden_layers)]
    known = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    if len(known) == 1:
        every = tuple(range(len(kinds)))
        return (Part(1, (Stack(0, LAYERS, config.of_layers(every), every, len(every)),)),)
    parts: list[Part] = []
    start = index = 0
    for period, repeats in patterns([known[kind] for kind in kinds]):
        runs = [len([*run]) for _, run in groupby(kinds[start : start + period])]
        if len(runs) == 1:  # one loop, and none around it
            runs, repeats = [period * repeats], 1
        stacks: list[Stack] = []
        first = start
        for together in runs:
            starts = range(first, first + repeats * sum(runs), sum(runs))
            numbers = tuple(begin + place for begin in starts for place in range(together))
            path = (*LAYERS, str(len(parts)), str(len(stacks)))
            stacks.append(Stack(index, path, config.of_layers(numbers), numbers, together))
            first, index = first + together, index + 1
        parts.append(Part(repeats, tuple(stacks)))
        start += repeats * sum(runs)
    return tuple(parts)


def patterns(kinds: Sequence[Hashable]) -> list[tuple[int, int]]:
    """A list cut into parts that repeat themselves: (the length of a pattern, how often it follows itself).

    Each part is as long as it can be, of the shortest pattern.

    Example:
        >>> patterns("aaabaaabaab"), patterns("aaaa"), patterns("abbb")
        ([(4, 2), (1, 2), (1, 1)], [(1, 4)], [(1, 1), (1, 3)])
    """
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(kinds):
        rest = kinds[start:]
        candidates = ((period, _repeats(rest, period)) for period in range(1, len(rest) // 2 + 1))
        repeated = [(period, times) for period, times in candidates if times > 1]
        period, times = max(repeated, key=lambda each: each[0] * each[1], default=(1, 1))
        found.append((period, times))
        start += period * times
    return found


def _repeats(kinds: Sequence[Hashable], period: int) -> int:
    """How often the first ``period`` of a list follow each other at its start."""
    same = next((i for i in range(period, len(kinds)) if kinds[i] != kinds[i - period]), len(kinds))
    return same // period


def stacks_of(config: DecoderConfig) -> tuple[Stack, ...]:
    """The stacks of a decoder's layers, in order."""
    return tuple(stack for part in parts_of(config) for stack in part.stacks)


def layer_numbers(config: DecoderConfig) -> dict[TreePath, tuple[int, ...]]:
    """The numbers of the layers in each stack, by its path.

    Example:
        >>> shape = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "mlp_only_layers": [0]}
        >>> layer_numbers(DecoderConfig.from_hf(shape))
        {('model', 'layers', '0', '0'): (0,), ('model', 'layers', '1', '0'): (1, 2, 3)}
    """
    return {stack.path: stack.numbers for stack in stacks_of(config)}


def names_in_stack(path: TreePath, numbers: Mapping[TreePath, tuple[int, ...]]) -> tuple[str, ...] | None:
    """HF's names of a module, or a leaf, of stacked layers; None of one that is in no stack.

    Args:
        path: in the parameter tree.
        numbers: from :func:`layer_numbers`.

    Example:
        >>> names_in_stack(("model", "layers", "0", "1", "mlp"), {("model", "layers", "0", "1"): (3, 5)})
        ('model.layers.3.mlp', 'model.layers.5.mlp')
    """
    for stack, layers in numbers.items():
        if path[: len(stack)] == stack:
            return tuple(".".join((*LAYERS, str(layer), *path[len(stack) :])) for layer in layers)
    return None
