import pytest
import torch
from torch import nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_torch.model import HyLoRADAModel


def small_model(seed=0):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    return HyLoRADAModel(base, HyLoRADAConfig(lora_rank=2, target_modules=("0", "2")), seed=seed)


def test_adapters_are_named_by_layer_and_leaf():
    leaves = ("lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight")
    assert list(small_model().adapters()) == [f"{layer}.{leaf}" for layer in "02" for leaf in leaves]


def test_loading_reproduces_the_model():
    trained, fresh = small_model(seed=0), small_model(seed=1)
    with torch.no_grad():
        for value in trained.adapters().values():
            value.add_(torch.randn_like(value))
    x = torch.randn(2, 5, 4)
    assert not torch.equal(fresh(x), trained(x))
    fresh.load_adapters(trained.adapters())
    assert torch.equal(fresh(x), trained(x))


def test_loading_what_does_not_fit_changes_nothing():
    model = small_model()
    before = {name: value.detach().clone() for name, value in model.adapters().items()}
    wrong = {name: value + 1 for name, value in before.items()}
    wrong["0.lora_C"] = wrong.pop("0.lora_B")
    wrong["2.lora_A"] = wrong["2.lora_A"][:1]
    with pytest.raises(CheckpointError) as error:
        model.load_adapters(wrong)
    for part in ("missing 0.lora_B", "unknown 0.lora_C", "2.lora_A is (1, 6), not (2, 6)"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.adapters().items())


def test_print_trainable_parameters(capsys):
    small_model().print_trainable_parameters()
    # 2·4 + 6·2 + 6 + 2 and 2·6 + 3·2 + 3 + 2 adapter parameters; 4·6 + 6 + 6·3 frozen ones.
    assert capsys.readouterr().out == "trainable params: 51 || all params: 99 || trainable%: 51.5152\n"
