import math

import numpy as np
import pytest
import torch

from hylorada_jax.errors import DataError
from hylorada_torch.position import (
    PositionBias,
    check_positions,
    default_positions,
    position_buckets,
    relative_buckets,
    structure_buckets,
)

EVERY_POSITION = np.arange(40_000)


def test_position_buckets_are_the_formula_one_by_one():
    def bucket(p):
        p = min(p, 32767)
        return p if p < 32 else min(32 + math.floor(31 * math.log(max(p - 32, 1)) / math.log(32736)), 63)

    assert position_buckets(EVERY_POSITION).tolist() == [bucket(p) for p in EVERY_POSITION.tolist()]


def log_bucket(a, count, nudge=0.0):
    exact = count // 2
    if a < exact:
        return a
    part = math.log(a / exact + nudge) / math.log(32768 / exact)
    return min(exact + math.floor(part * (count - exact)), count - 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_relative_and_structure_buckets_are_the_formulas_one_by_one(sign):
    distances = sign * EVERY_POSITION[1:]
    expected = [log_bucket(abs(d), 32) + 32 * (d < 0) for d in distances.tolist()]
    assert relative_buckets(distances).tolist() == expected
    expected = [log_bucket(abs(t), 64, 1e-6) + 64 * (t >= 0) for t in distances.tolist()]
    assert structure_buckets(distances).tolist() == expected
    assert (relative_buckets(np.array(0)), structure_buckets(np.array(0))) == (0, 64)


def test_the_factor_of_a_position_is_that_of_its_bucket():
    bias = PositionBias(dtype=torch.float64)
    assert {name: value.shape for name, value in bias.named_parameters()} == {"position_bias": (64,)}
    assert not bias(torch.arange(100)[None]).any()
    with torch.no_grad():
        bias.position_bias.copy_(torch.linspace(-2, 2, 64))
    t = bias(torch.tensor([[0, 31, 40, 10**6]]))
    assert torch.equal(t[0], torch.tanh(bias.position_bias[torch.tensor([0, 31, 38, 62])]))


def test_positions_are_counted_from_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert default_positions(3, 4, mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 1, 2, 3]]
    assert default_positions(2, 3).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("positions", "received"),
    [
        (torch.tensor([[0, -2, 1]]), "-2"),
        (torch.tensor([0, 1, 2]), r"\(3,\)"),
        (torch.tensor([[0, 1]]), r"\(1, 2\)"),
        (torch.tensor([[0.0, 1.0, 2.0]]), "float32"),
    ],
)
def test_wrong_positions_are_refused(positions, received):
    with pytest.raises(DataError, match=received):
        check_positions(positions, 1, 3)
