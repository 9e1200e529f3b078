"""What the kernels compute: parity_tests/test_attention_kernels.py."""

from itertools import groupby, product

import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math import kernel_grid
from hylorada_jax.math.kernel_grid import Grid, Settings

SIZE, BLOCKS, GROUP = 4, 6, 2
# Two rows: of three documents, of which one ends within a block, and of padding after one.
SEGMENTS = np.stack([np.repeat([0, 1, 2], [9, 7, 8]), np.repeat([0, -1], [6, 18])])


def at_each_step(by_query, causal, window, monkeypatch):
    """At each step in turn: the blocks of keys, queries and results, and whether the step is live."""
    settings = Settings(SIZE, causal, None, None, learned=False, interpret=True)
    array = jnp.zeros((2, 2 * GROUP, BLOCKS * SIZE, 8))
    grid = Grid(settings, array.shape, 2, by_query=by_query)
    calls = []

    def called(body, *, grid_spec, **options):
        def kept(*arguments):
            calls.append((grid_spec, arguments))
            return []

        return kept

    monkeypatch.setattr(kernel_grid.pl, "pallas_call", called)
    grid.run(
        lambda *_: None,
        [(array, grid.key), (array, grid.query)],
        [(array, grid.query if by_query else grid.key)],
        [(1, SIZE)],
        segments=jnp.asarray(SEGMENTS),
        window=jnp.int32(window),
        products=1,
    )
    ((spec, (order, next_live, *_)),) = calls
    steps, tables = [*np.ndindex(*spec.grid)], (np.asarray(order), np.asarray(next_live))
    blocks = [
        [tuple(int(n) for n in of.index_map(*step, *tables)) for step in steps]
        for of in (*spec.in_specs, *spec.out_specs)
    ]
    return *blocks, [tables[1][row, pair] == pair for _, row, pair, _ in steps]


def in_order(by_query, causal):
    """(row, query head, block of queries, block of keys) of every step in turn."""
    if by_query:
        steps = [(row, head, i, j) for head, row, i, j in np.ndindex(2 * GROUP, 2, BLOCKS, BLOCKS)]
    else:
        places = np.ndindex(2, 2, BLOCKS, BLOCKS, GROUP)
        steps = [(row, kv * GROUP + of_group, i, j) for kv, row, j, i, of_group in places]
    return [step for step in steps if step[2] >= step[3] or not causal]


def sees(row, i, j, causal, window):
    """Whether a token of block i of queries sees one of block j of keys, by trying each."""
    queries, keys = (range(n * SIZE, (n + 1) * SIZE) for n in (i, j))
    return any(
        SEGMENTS[row, q] == SEGMENTS[row, k] and q - k < window and (q >= k or not causal)
        for q, k in product(queries, keys)
    )


@pytest.mark.parametrize("by_query", [True, False])
@pytest.mark.parametrize(("causal", "window"), [(True, 99), (True, 5), (False, 99)])
def test_each_block_that_is_seen_is_read_once_and_no_other(by_query, causal, window, monkeypatch):
    keys, queries, results, live = at_each_step(by_query, causal, window, monkeypatch)
    steps = in_order(by_query, causal)
    seen = [(row, head, i, j) for row, head, i, j in steps if sees(row, i, j, causal, window)]
    assert len(seen) == sum(live) < len(live) == len(steps)

    def once(blocks):
        return [block for block, _ in groupby(blocks)]

    assert once(keys) == once((row, head // GROUP, j, 0) for row, head, _, j in seen)
    assert once(queries) == once((row, head, i, 0) for row, head, i, _ in seen)
    # What is written has its own place at every step, also at one that is passed over.
    owners = [(row, head, i, 0) if by_query else (row, head // GROUP, j, 0) for row, head, i, j in steps]
    assert results == owners
