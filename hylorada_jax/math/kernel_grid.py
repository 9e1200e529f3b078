"""The blocks that a kernel of attention goes through on a TPU, and what it reads and writes at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from hylorada_jax.math.kernel_rows import nearest, visible_blocks


class Settings(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        size: tokens of a block of queries, and of one of keys.
        causal: a token sees none that is later.
        reach: the window, where it is known; blocks out of it are no part of the program.
        soft_cap: bound of the logits.
        learned: the bias has a gradient.
        interpret: step by step, on any platform.
    """

    size: int
    causal: bool
    reach: int | None
    soft_cap: float | None
    learned: bool
    interpret: bool

    def origin(self, length: int) -> int:
        """Where distance 0 is in the bias: a multiple of ``size``, after the distances of later tokens."""
        return self.size if self.causal else length


class Block(NamedTuple):
    """The part of an array that a kernel has at a step.

    Attributes:
        shape: None where an axis has one entry at a time.
        at: which block, from (row, query head, block of queries, block of keys).
    """

    shape: tuple[int | None, ...]
    at: Callable[[Any, Any, Any, Any], tuple[Any, ...]]


class Step(NamedTuple):
    """Where a kernel is.

    Attributes:
        begins: the first step of a head, over all rows.
        first: the first step of a block that sums are for.
        last: the last such.
        live: some query of the block may see some key of it.
        stretch: which stretch of the bias it sees, in blocks: the first of two.
    """

    begins: Array
    first: Array
    last: Array
    live: Array
    stretch: Array


class Grid:
    """Blocks of queries and keys that see each other, one after the other.

    By queries: all blocks of keys for a block of queries, then the next. By keys: all blocks of queries for a
    block of keys, with every query head that reads it. So what is summed up stays in fast memory.

    Args:
        settings: what is seen, and in what blocks.
        shape: of the queries, [batch, heads, seq, head_dim].
        kv_heads: heads of the keys.
        by_query: the order.
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...], kv_heads: int, *, by_query: bool) -> None:
        self._settings, (self._batch, self._heads, length, self._dim) = settings, shape
        size, group = settings.size, self._heads // kv_heads
        self._inner = 1 if by_query else group
        self._origin = settings.origin(length) // size
        pairs = visible_blocks(length, size, causal=settings.causal, window=settings.reach)
        mine = 0 if by_query else 1
        self._pairs = pairs[:, np.argsort(pairs[mine], kind="stable")]
        new = np.diff(self._pairs[mine], prepend=-1, append=-1) != 0
        self._edges = new[:-1], new[1:]
        tensor = (None, None, size, self._dim)
        self.query = Block(tensor, lambda row, head, i, j: (row, head, i, 0))
        self.key = Block(tensor, lambda row, head, i, j: (row, head // group, j, 0))
        self.number = Block((None, None, 1, size), lambda row, head, i, j: (row, head, 0, i))
        self.query_segments = Block((None, 1, size), lambda row, head, i, j: (row, 0, i))
        self.key_segments = Block((None, 1, size), lambda row, head, i, j: (row, 0, j))
        self.near = Block((None, 1, size), lambda row, head, i, j: (head, 0, i - j - 1 + self._origin))
        self.far = Block((None, 1, size), lambda row, head, i, j: (head, 0, i - j + self._origin))

    def _next_live(self, segments: Array | None, window: ArrayLike) -> Int[Array, "batch pair"]:
        """For each pair of a row, the first from it on of which some query may see some key.

        The last pair is such: a block sees itself.
        """
        query, key = self._pairs
        live = jnp.broadcast_to(nearest(query - key, self._settings.size) < window, (self._batch, query.size))
        if segments is not None:
            blocks = segments.reshape(self._batch, -1, self._settings.size)
            low, high = blocks.min(axis=2), blocks.max(axis=2)
            live &= (low[:, query] <= high[:, key]) & (low[:, key] <= high[:, query])
        last = query.size - 1
        places = jnp.where(live, np.arange(query.size, dtype=np.int32), last)
        return jax.lax.cummin(places, axis=1, reverse=True)

    def run(
        self,
        kernel: Callable[..., None],
        inputs: Sequence[tuple[Array | None, Block]],
        outputs: Sequence[tuple[Any, Block]],
        sums: Sequence[tuple[int, ...]],
        *,
        segments: Array | None,
        window: ArrayLike,
        products: int,
    ) -> Sequence[Array]:
        """What a kernel writes.

        Args:
            kernel: takes a :class:`Step`, and references to the inputs (None to one that is None), outputs
                and sums.
            inputs: arrays, and what of them it reads.
            outputs: what it writes; of the arrays only the shape and dtype are read.
            sums: shapes of float32 numbers that are kept between steps; zero at the first.
            segments: a block of which no query and key have the same is passed over.
            window: so is one with greater distances.
            products: matrix products in a step, for the cost.
        """
        order = jnp.asarray(np.stack([*self._pairs, *self._edges]), jnp.int32)
        grid = (self._heads // self._inner, self._batch, self._pairs.shape[1], self._inner)

        def body(order, next_live, *references) -> None:
            row, pair, inner = (pl.program_id(axis) for axis in (1, 2, 3))
            first = (order[2, pair] == 1) & (inner == 0)
            step = Step(
                begins=first & (pair == 0) & (row == 0),
                first=first,
                last=(order[3, pair] == 1) & (inner == self._inner - 1),
                live=next_live[row, pair] == pair,
                stretch=order[0, pair] - order[1, pair] - 1 + self._origin,
            )
            kept = references[len(inputs) + len(outputs) :]

            @pl.when(step.first)
            def start() -> None:
                for numbers in kept:
                    numbers[...] = jnp.zeros_like(numbers)

            kernel(step, references[: len(inputs)], references[len(inputs) : -len(kept)], kept)

        def written(block: Block) -> pl.BlockSpec:
            def index(outer, row, pair, inner, order, next_live):
                return block.at(row, outer * self._inner + inner, order[0, pair], order[1, pair])

            return pl.BlockSpec(block.shape, index)

        def read(block: Block) -> pl.BlockSpec:
            # A block is copied when a step has another than the one before. So a pair that is passed over has
            # those of the next that is not, which are so also fetched while the one before is computed.
            def index(outer, row, pair, inner, order, next_live):
                place = next_live[row, pair]
                head = outer * self._inner + jnp.where(place == pair, inner, 0)
                return block.at(row, head, order[0, place], order[1, place])

            return pl.BlockSpec(block.shape, index)

        given = [(array, block) for array, block in inputs if array is not None]
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[None if array is None else read(block) for array, block in inputs],
                out_specs=[written(block) for _, block in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
            ),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")
            ),
            cost_estimate=self._cost([*given, *outputs], products),
            interpret=self._settings.interpret,
        )(order, self._next_live(segments, window), *(array for array, _ in inputs))

    def _cost(self, touched: Sequence[tuple[Any, Block]], products: int) -> pl.CostEstimate:
        """Of all blocks, as if none were passed over: a block is moved when the next step has another."""
        shape = self._heads // self._inner, self._batch, self._pairs.shape[1], self._inner
        outer, row, pair, inner = (axis.ravel() for axis in np.indices(shape))
        place = (row, outer * self._inner + inner, *self._pairs[:, pair])
        moved = 0
        for array, block in touched:
            index = np.stack(np.broadcast_arrays(*block.at(*place)))
            times = 1 + int((np.diff(index, axis=1) != 0).any(axis=0).sum())
            moved += times * int(np.prod([n or 1 for n in block.shape])) * array.dtype.itemsize
        square = pair.size * self._settings.size**2
        return pl.CostEstimate(
            flops=2 * products * self._dim * square, transcendentals=square, bytes_accessed=moved
        )
