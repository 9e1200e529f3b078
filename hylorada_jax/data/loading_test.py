import json

import numpy as np
import pytest

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.loading import mixed_batches, rows_of_epoch
from hylorada_jax.data.packing import Rows


def rows():
    return Rows([TokenizedDocument(np.arange(n)) for n in (30, 40, 50)], 8)


def alone():
    return [(rows(), 1)]


def drawn(batches, count):
    return [next(batches)["row"].tolist() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_epoch_has_every_row_once_in_another_order(batch_size):
    n = len(rows())
    order = np.concatenate(drawn(mixed_batches(alone(), batch_size, seed=0), 2 * n // batch_size + 1))
    first, second = order[:n], order[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(n))


def test_the_seed_decides_the_order():
    assert drawn(mixed_batches(alone(), 4, seed=1), 3) == drawn(mixed_batches(alone(), 4, seed=1), 3)
    n = len(rows())
    epochs = {tuple(epoch) for seed in range(6) for epoch in drawn(mixed_batches(alone(), n, seed), 4)}
    assert len(epochs) == 6 * 4


def mixed(weights=(0.7, 0.1, 0.2)):
    """Sources of 15, 5 and 11 rows."""
    every = [*rows()]
    return [*zip((every, every[:5], every[4:]), weights, strict=True)]


def test_an_iterator_goes_on_from_its_state_through_json():
    for shares in (alone(), mixed()):
        batches = mixed_batches(shares, 4, seed=0)
        drawn(batches, 5)
        state = json.loads(json.dumps(batches.get_state()))
        expected = drawn(batches, 6)
        again = mixed_batches(shares, 4, seed=0)
        again.set_state(state)
        assert drawn(again, 6) == expected


@pytest.mark.parametrize("weights", [(0.7, 0.1, 0.2), (1, 1, 1), (3, 1, 20)], ids=str)
def test_sources_have_their_shares_of_the_rows_and_are_passed_over_as_one_alone(weights):
    starts = np.cumsum([0, 15, 5, 11])
    order = np.concatenate(drawn(mixed_batches(mixed(weights=weights), 3, seed=7), 60))
    of = np.searchsorted(starts, order, side="right") - 1
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        counts = np.cumsum(of == source)
        # At any moment within two turns, as grain counts by floors of floors; and it takes for the
        # weights whole numbers, the smallest of which is 100.
        rows_so_far = np.arange(1, len(order) + 1)
        assert (np.abs(counts - share * rows_so_far) <= 2 + 0.01 * share * rows_so_far).all()
        size = starts[source + 1] - starts[source]
        passes = (order[of == source] - starts[source])[: counts[-1] // size * size].reshape(-1, size)
        assert (np.sort(passes) == np.arange(size)).all()
        assert len({tuple(each) for each in passes}) > len(passes) // 2
    # Until the first source is used up nothing comes twice; and with one turn more of each, something does.
    epoch = rows_of_epoch(mixed(weights=weights))
    assert len({*order[:epoch]}) == epoch
    longer = order[: epoch + int(sum(weights) / min(weights)) + 1]
    assert len({*longer}) < len(longer)


def test_a_batch_has_the_rows_it_names():
    sources = mixed()
    every = [row for source, _ in sources for row in source]
    for batch, given in (
        (next(mixed_batches(alone(), 4, seed=0)), rows()),
        (next(mixed_batches(sources, 9, seed=0)), every),
    ):
        for i, row in enumerate(batch["row"]):
            for name, values in given[row].items():
                np.testing.assert_array_equal(batch[name][i], values)
