import json

import numpy as np
import pytest

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.loading import shuffled_batches
from hylorada_jax.data.packing import Rows


def rows():
    return Rows([TokenizedDocument(np.arange(n)) for n in (30, 40, 50)], 8)


def drawn(batches, count):
    return [next(batches)["row"].tolist() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_epoch_has_every_row_once_in_another_order(batch_size):
    n = len(rows())
    order = np.concatenate(drawn(shuffled_batches(rows(), batch_size, seed=0), 2 * n // batch_size + 1))
    first, second = order[:n], order[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(n))


def test_the_seed_decides_the_order():
    assert drawn(shuffled_batches(rows(), 4, seed=1), 3) == drawn(shuffled_batches(rows(), 4, seed=1), 3)
    assert drawn(shuffled_batches(rows(), 4, seed=1), 3) != drawn(shuffled_batches(rows(), 4, seed=2), 3)


def test_an_iterator_goes_on_from_its_state_through_json():
    batches = shuffled_batches(rows(), 4, seed=0)
    drawn(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = drawn(batches, 6)
    again = shuffled_batches(rows(), 4, seed=0)
    again.set_state(state)
    assert drawn(again, 6) == expected


def test_a_batch_has_the_rows_it_names():
    batch = next(shuffled_batches(rows(), 4, seed=0))
    for i, row in enumerate(batch["row"]):
        for name, values in rows()[row].items():
            np.testing.assert_array_equal(batch[name][i], values)
