import pytest
import torch
from torch import nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig
from hylorada_torch.model import HyLoRADAModel
from hylorada_torch.optimizer import clip_by_global_norm, make_optimizer, parameter_groups

TRAINING = TrainingConfig(output_dir="run", steps=4, learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.5)


def small_model():
    return HyLoRADAModel(nn.Sequential(nn.Linear(4, 6)), HyLoRADAConfig(target_modules=("0",)))


def test_the_groups_are_the_table_of_method_md():
    adapters = small_model().adapters()
    groups = parameter_groups(adapters, TRAINING, HyLoRADAConfig(lora_plus_ratio=16.0))
    names = {id(parameter): name for name, parameter in adapters.items()}
    table = {
        group["name"]: ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in groups
    }
    assert table == {
        "lora_A": (["0.lora_A"], 1e-3, 0.1),
        "lora_B": (["0.lora_B"], 1.6e-2, 0.1),
        "magnitude": (["0.magnitude"], 1e-3, 0.0),
        "gate": (["0.magnitude_gate", "0.residual_weight"], 1e-3, 0.0),
    }
    without = parameter_groups(adapters, TRAINING, HyLoRADAConfig(lora_plus_enabled=False))
    assert {group["lr"] for group in without} == {1e-3}


def test_a_parameter_without_a_group_is_an_error():
    with pytest.raises(ConfigError, match=r"0\.shift"):
        parameter_groups({"0.shift": nn.Parameter(torch.zeros(1))}, TRAINING, HyLoRADAConfig())


def test_every_rate_follows_the_schedule():
    optimizer, scheduler = make_optimizer(small_model().adapters(), TRAINING, HyLoRADAConfig())
    rates = []
    for _ in range(5):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    peak = [1e-3, 1e-2, 1e-3, 1e-3]
    assert rates == [[factor * rate for rate in peak] for factor in (0.0, 0.5, 1.0, 0.5, 0.0)]


@pytest.mark.parametrize(("size", "expected"), [(3.0, [0.6, 0.8]), (0.03, [0.03, 0.04])])
def test_clipping_keeps_the_direction_and_bounds_the_norm(size, expected):
    gradients = [torch.tensor(size * part, dtype=torch.float64) for part in (1.0, 4 / 3)]
    parameters = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    clip_by_global_norm(parameters, 1.0)
    # Float64 rounding of a square root and a few products.
    assert [gradient.item() for gradient in gradients] == pytest.approx(expected, rel=1e-14)
