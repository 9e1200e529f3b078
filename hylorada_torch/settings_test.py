"""The reference's own arithmetic, against exact fractions and against what the JAX package computes."""

import math
from fractions import Fraction

import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import TargetError
from hylorada_jax.surgery import targets
from hylorada_jax.training.config import TrainingConfig
from hylorada_torch.settings import floor_of, layer_ranks, rising_steps, s2_groups

TYPED = [*(f"0.{digits:03d}" for digits in range(1, 1000)), "1.0", "1e-05", "0.0000123"]


@pytest.mark.parametrize("whole", [7, 9, 100, 128, 1000])
def test_floors_and_ceilings_are_exact(whole):
    for text in TYPED:
        assert floor_of(float(text), whole) == math.floor(Fraction(text) * whole), text
        training = TrainingConfig(output="run", steps=whole, warmup_ratio=float(text))
        assert rising_steps(training) == training.rising_steps == math.ceil(Fraction(text) * whole), text
    assert all(floor_of(k / whole, whole) == k for k in range(whole + 1))
    once = TrainingConfig(output="run", steps=1)
    assert rising_steps(once) == once.rising_steps


@pytest.mark.parametrize("strategy", ["uniform", "importance", "decreasing"])
def test_ranks_by_depth_are_those_of_the_jax_package(strategy):
    for depth in range(1, 33):
        names = [f"model.layers.{i}.q_proj" for i in range(depth)] + ["lm_head"]
        for rank in range(1, 33):
            config = HyLoRADAConfig(
                lora_rank=rank, rank_strategy=strategy, rank_pattern={r"model\.layers\.0\.q_proj": 5}
            )
            assert layer_ranks(names, names, config) == targets.layer_ranks(names, names, config)


@pytest.mark.parametrize("strategy", ["importance", "decreasing"])
def test_ranks_by_depth_of_names_without_numbers_are_refused_as_in_the_jax_package(strategy):
    config, names = HyLoRADAConfig(lora_rank=8, rank_strategy=strategy), ["fc", "out"]
    with pytest.raises(TargetError, match=rf"{strategy}[\s\S]*fc, out") as ours:
        layer_ranks(names, names, config)
    with pytest.raises(TargetError) as theirs:
        targets.layer_ranks(names, names, config)
    assert str(ours.value) == str(theirs.value)
    # Nothing has a rank where no linear layer is adapted.
    sparse = HyLoRADAConfig(method="sparse", rank_strategy=strategy)
    assert layer_ranks([], names, sparse) == targets.layer_ranks([], names, sparse) == {}


def test_groups_are_those_of_the_jax_package():
    for text in TYPED[:999]:
        for size in (None, 1000):
            config = HyLoRADAConfig(method="longlora", s2_shift_ratio=float(text), s2_group_size=size)
            assert s2_groups(config, 90) == config.s2_groups(90), text
