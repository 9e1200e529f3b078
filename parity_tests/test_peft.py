"""LoRA, rsLoRA and DoRA against the installed peft, on whole models that carry the same A, B and m."""

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from hylorada_jax.config import HyLoRADAConfig
from parity_tests.models import CONFIGS, all_in_float64, build, measuring, torch_base, torch_results
from parity_tests.tolerances import MODEL, relative_error

ALL = "all-linear"
BY_DEPTH: dict[str, Any] = {"lora_rank": 6, "rank_strategy": "decreasing", "target_modules": ALL}
# GPT-2 has Conv1D for linear layers and biases everywhere, Qwen2 biases on q, k and v.
CASES = {
    "lora-gpt2": (CONFIGS["lora"], ALL),
    "rslora-gpt2": (CONFIGS["lora, rslora, its own targets"], ["c_attn"]),
    "dora-gpt2": (CONFIGS["dora"], ALL),
    "lora-qwen2": (CONFIGS["lora"], ALL),
    "rslora-qwen2": (HyLoRADAConfig(method="lora", use_rslora=True, **BY_DEPTH), ALL),
    "dora-qwen2": (HyLoRADAConfig(method="dora", **BY_DEPTH), ALL),
}


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case):
    config, targets = CASES[case]
    family = case.split("-")[1]
    with measuring("float64"):
        pair = build(family, config, "float64")
        got = pair.got()
    peft, leaves = peft_model(family, pair.reference, targets)
    expected = torch_results(peft, pair.inputs, leaves)
    check(got, expected)
    check(pair.expected(), expected)


def peft_model(family, reference, targets):
    """peft's model over the base of a family, in float64, with the reference's adapters.

    Args:
        family: a key of FAMILIES.
        reference: whose settings and values are taken; what it trains of the base, this one trains too.
        targets: peft's target_modules.

    Returns:
        The model, and its trainable parameters by the reference's names.
    """
    config = reference.config
    options = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=targets,
        fan_in_fan_out=family == "gpt2",
    )
    if config.rank_strategy == "decreasing":
        # The second layer has half the rank and, so that their ratio stays, half of α.
        options.rank_pattern = {r".*\.1\..*": config.lora_rank // 2}
        options.alpha_pattern = {r".*\.1\..*": config.lora_alpha / 2}
    with all_in_float64():
        model = get_peft_model(torch_base(family, "float64"), options)
    adapters = reference.adapters()
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own <= {their_name(name) for name in adapters}, own
    leaves = {name: model.get_parameter(their_name(name)) for name in adapters}
    for name, leaf in leaves.items():
        assert leaf.shape == adapters[name].shape
        leaf.requires_grad_().data.copy_(adapters[name])
    return model, leaves


def their_name(name):
    layer, leaf = name.rsplit(".", 1)
    if leaf in ("weight", "bias"):  # the base model's own
        return f"base_model.model.{name}"
    leaf = "lora_magnitude_vector" if leaf == "magnitude" else leaf
    return f"base_model.model.{layer}.{leaf}.default.weight"


def check(got, expected):
    assert set(got) == set(expected)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= MODEL["float64"], errors
