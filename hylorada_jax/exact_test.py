"""Oracle: Python's fractions of the very digits that a user types."""

import math
from fractions import Fraction

import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.exact import fraction
from hylorada_jax.math.sparse import units_on
from hylorada_jax.training.config import TrainingConfig

TYPED = [*(f"0.{digits:03d}" for digits in range(1, 1000)), "1.0", "1e-05", "0.0000123", "0.123456789"]


def test_a_float_means_the_decimal_that_was_typed():
    assert all(fraction(float(text)) == Fraction(text) for text in [*TYPED, "0", "-0.29", "3e20"])


def test_a_float_means_the_quotient_that_was_computed():
    quotients = [(k, n) for n in range(1, 130) for k in range(n + 1)]
    assert all(fraction(k / n) == Fraction(k, n) for k, n in quotients)


@pytest.mark.parametrize("whole", [7, 100, 128, 200, 1000])
def test_units_and_warm_up_steps_are_exact(whole):
    for text in TYPED:
        ratio = float(text)
        assert units_on(ratio, whole) == max(1, math.floor(Fraction(text) * whole)), text
        training = TrainingConfig(output="run", steps=whole, warmup_ratio=ratio)
        assert training.rising_steps == math.ceil(Fraction(text) * whole), text


@pytest.mark.parametrize("strategy", ["importance", "decreasing"])
def test_ranks_by_depth_are_exact(strategy):
    for rank in range(1, 65):
        config = HyLoRADAConfig(lora_rank=rank, rank_strategy=strategy)
        for depth in range(2, 33):
            for layer in range(depth):
                far = min(layer, depth - 1 - layer)
                t = (
                    Fraction(far) / Fraction(depth, 2)
                    if strategy == "importance"
                    else Fraction(layer, depth - 1)
                )
                exact = math.floor(rank * (1 - t / 2))
                assert config.layer_rank(layer, depth) == max(min(2, rank), exact), (rank, depth, layer)


def test_a_shift_is_exact_or_refused():
    for text in TYPED[:999]:
        config = HyLoRADAConfig(method="longlora", s2_shift_ratio=float(text))
        size, shift = config.s2_groups(64)
        assert shift == Fraction(text) * size, text
    with pytest.raises(ConfigError, match=r"Take 119/964, 0\.1234"):
        HyLoRADAConfig(method="longlora", s2_shift_ratio=0.12345)
