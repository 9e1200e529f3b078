"""Models whose frozen kernels are in int8 or nf4, against the reference on the numbers they stand for."""

import numpy as np
import pytest
import torch

import hylorada_torch
from hylorada_jax.math.quantized import plain
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.families import ROUTERS
from hylorada_jax.models.loading import load_model
from hylorada_jax.surgery.modules import find_modules
from parity_tests.families import all_in_float64, measuring, saved, torch_base
from parity_tests.models import CONFIGS, SPREAD, Pair, budgets, draw_inputs, errors, random_adapters


@pytest.mark.parametrize(
    ("family", "name", "base_dtype"),
    [("phi3", "hylorada", "nf4"), ("mixtral", "hylorada_v1", "int8")],
)
def test_a_quantised_base_is_the_reference_on_its_numbers(family, name, base_dtype):
    with measuring("float64"):
        base = load_model(saved(family, "float64").name, dtype="float64", base_dtype=base_dtype)
        numbers = plain(base.params)
        with all_in_float64():
            theirs = torch_base(family, "float64")
            for linear in find_modules(base.init_params).linears:
                for layer, full in enumerate(linear.names):
                    weight = theirs.get_submodule(full).weight
                    rounded = torch.tensor(np.asarray(linear.weight(numbers, layer)))
                    assert torch.equal(weight, rounded) == full.endswith(ROUTERS)
                    weight.data.copy_(rounded)
            reference = hylorada_torch.HyLoRADAModel(theirs, CONFIGS[name])
        pair = Pair(reference, HyLoRADAModel(base, CONFIGS[name]), draw_inputs(family, CONFIGS[name]))
        pair.load(random_adapters(reference, SPREAD))
        found, allowed = errors(pair.got(), pair.expected()), budgets(family, "float64")
    assert all(found[direction] <= allowed[direction] for direction in allowed), (found, allowed)
