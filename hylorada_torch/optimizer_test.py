import dataclasses
import re

import pytest
import torch
from torch import nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig
from hylorada_torch.conftest import base_model
from hylorada_torch.model import HyLoRADAModel
from hylorada_torch.optimizer import clip_by_global_norm, make_optimizer, parameter_groups
from hylorada_torch.structure import StructureEncoder

TRAINING = TrainingConfig(output="run", steps=4, learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.5)


def small_model():
    return HyLoRADAModel(
        nn.Sequential(nn.Linear(4, 6)), HyLoRADAConfig(use_hylorada=True, target_modules=("0",))
    )


def test_the_groups_are_the_table_of_method_md():
    adapters = small_model().adapters()
    groups = parameter_groups(
        adapters, TRAINING, HyLoRADAConfig(lora_plus_enabled=True, lora_plus_ratio=16.0)
    )
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
    without = parameter_groups(adapters, TRAINING, HyLoRADAConfig(lora_plus_ratio=16.0))
    assert {group["lr"] for group in without} == {1e-3}


def test_every_component_has_its_group():
    config = HyLoRADAConfig(
        method="hylorada",
        lora_plus_enabled=True,
        target_modules=("q_proj",),
        sparse_enabled=True,
        train_embeddings=True,
        train_norms=True,
    )
    adapters = HyLoRADAModel(base_model("qwen3"), config).adapters()
    encoder = StructureEncoder()
    adapters |= {f"structure_encoder.{name}": value for name, value in encoder.named_parameters()}
    names = {id(parameter): name for name, parameter in adapters.items()}
    groups = parameter_groups(adapters, TRAINING, config)
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(adapters)

    def leaves(group):
        # By what is left of a name without the layer: "0.self_attn.alpha" and "1.self_attn.alpha" are one.
        return {re.sub(r"^model\.layers\.\d\.", "", names[id(p)]) for p in group["params"]}

    q, attention, mlp = "self_attn.q_proj.", "self_attn.", "mlp.down_proj."
    encoder_leaves = {name for name in adapters if name.startswith("structure_encoder.")}
    gates = {
        "position_bias",
        *(f"{q}{leaf}" for leaf in ("magnitude_gate", "residual_weight", "position_scale")),
    }
    norms = {
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "model.norm",
    }
    assert {group["name"]: (leaves(group), group["lr"], group["weight_decay"]) for group in groups} == {
        "lora_A": ({f"{q}lora_A"}, 1e-3, 0.1),
        "lora_B": ({f"{q}lora_B"}, 1e-2, 0.1),
        "magnitude": ({f"{q}magnitude"}, 1e-3, 0.0),
        "gate": (gates | encoder_leaves, 1e-3, 0.0),
        "daa": ({f"{attention}{leaf}" for leaf in ("alpha", "beta", "position_bias")}, 1e-3, 0.0),
        "sparse": ({f"{mlp}down", f"{mlp}up"}, 2e-4, 0.1),
        "sparse_gate": ({f"{mlp}gate_scores"}, 2e-4, 0.0),
        "unfrozen": ({"model.embed_tokens.weight"}, 1e-3, 0.1),
        "unfrozen_norm": ({f"{name}.weight" for name in norms}, 1e-3, 0.0),
    }


def test_a_parameter_without_a_group_is_an_error():
    with pytest.raises(ConfigError, match=r"0\.shift"):
        parameter_groups({"0.shift": nn.Parameter(torch.zeros(1))}, TRAINING, HyLoRADAConfig())


def test_every_rate_follows_the_schedule():
    config = HyLoRADAConfig(lora_plus_enabled=True)
    optimizer, scheduler = make_optimizer(small_model().adapters(), TRAINING, config)
    rates = []
    for _ in range(5):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    peak = [1e-3, 1e-2, 1e-3, 1e-3]
    assert rates == [[factor * rate for rate in peak] for factor in (0.0, 0.5, 1.0, 0.5, 0.0)]
    with pytest.raises(ConfigError, match="for_rows"):
        make_optimizer(small_model().adapters(), dataclasses.replace(TRAINING, epochs=1), config)


@pytest.mark.parametrize(("size", "expected"), [(3.0, [0.6, 0.8]), (0.03, [0.03, 0.04])])
def test_clipping_keeps_the_direction_and_bounds_the_norm(size, expected):
    gradients = [torch.tensor(size * part, dtype=torch.float64) for part in (1.0, 4 / 3)]
    parameters = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    clip_by_global_norm(parameters, 1.0)
    # Float64 rounding of a square root and a few products.
    assert [gradient.item() for gradient in gradients] == pytest.approx(expected, rel=1e-14)
