import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from hylorada_jax.errors import ConfigError
from hylorada_torch.conftest import randomize
from hylorada_torch.sparse import SparseAdapter, TopKGate, topk_mask


@pytest.mark.parametrize(("n", "ratio", "k"), [(128, 0.1, 12), (5, 0.1, 1), (8, 1.0, 8), (10, 0.35, 3)])
def test_the_mask_is_one_on_the_largest_scores(n, ratio, k):
    gate = TopKGate(n, ratio)
    mask = gate()
    assert sorted(set(mask.tolist())) == ([1.0] if k == n else [0.0, 1.0])
    largest = sorted(range(n), key=lambda unit: -gate.gate_scores[unit].item())[:k]
    assert mask.nonzero()[:, 0].tolist() == sorted(largest)
    assert topk_mask(torch.zeros(4), 0.5, 1.0).tolist() == [1, 1, 0, 0]


def test_the_gradient_is_that_of_the_softmax():
    gate = TopKGate(6, 0.5, temperature=0.7, dtype=torch.float64)
    cotangent = torch.arange(6, dtype=torch.float64)
    weights = np.exp(gate.gate_scores.detach().numpy() / 0.7)
    weights /= weights.sum()
    # d(n·softmax)/dscores, written out: n/τ·(diag(w) − w wᵀ).
    expected = 6 / 0.7 * (np.diag(weights) - np.outer(weights, weights)) @ cotangent.numpy()
    got = torch.autograd.grad(gate(), gate.gate_scores, cotangent)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)


def test_the_adapter_is_the_formula_of_method_md():
    adapter = SparseAdapter(3, adapter_dim=8, topk_ratio=0.4, dtype=torch.float64)
    assert {name: tuple(value.shape) for name, value in adapter.named_parameters()} == {
        "down": (8, 3),
        "up": (3, 8),
        "gate_scores": (8,),
    }
    randomize(adapter.parameters())
    h = torch.randn(2, 4, 3, dtype=torch.float64)
    down, up, scores = (value.detach().numpy() for value in (adapter.down, adapter.up, adapter.gate_scores))
    on = np.argsort(-scores)[:3]
    z = h.numpy() @ down[on].T
    gelu = z / 2 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    np.testing.assert_allclose(adapter(h).detach(), h.numpy() + gelu @ up[:, on].T, rtol=1e-13, atol=1e-13)


def test_a_fresh_adapter_changes_nothing_and_its_values_are_those_of_the_table():
    adapter, h = SparseAdapter(50, generator=torch.Generator().manual_seed(0)), torch.randn(2, 4, 50)
    assert torch.equal(adapter(h), h)
    assert adapter(h.bfloat16()).dtype == torch.bfloat16
    # Uniform on ±1/√hidden: 6400 draws come within 1% of the bound.
    assert 0.99 / math.sqrt(50) < adapter.down.abs().max() <= 1 / math.sqrt(50)
    # The deviation of 128 normal draws is within 20% of its own, by three of its deviations.
    assert adapter.gate_scores.std().item() == pytest.approx(0.02, rel=0.2)


def test_dropout_drops_units_in_training_alone():
    adapter = SparseAdapter(200, adapter_dim=200, topk_ratio=1.0, dropout=0.25)
    with torch.no_grad():
        adapter.down.copy_(torch.eye(200))
        adapter.up.copy_(torch.eye(200))
    h = torch.ones(1, 1, 200)
    full = adapter.eval()(h)
    assert len(set(full.flatten().tolist())) == 1
    added = adapter.train()(h) - h
    # A unit gives 0, or its value over 1 − p; float32.
    kept = added[added != 0]
    assert 0 < len(kept) < 200
    torch.testing.assert_close(kept, (full - h)[added != 0] / 0.75)


def test_gradients_are_those_of_finite_differences():
    adapter = SparseAdapter(3, adapter_dim=4, topk_ratio=0.5, dtype=torch.float64)
    randomize(adapter.parameters())
    h = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def output(h, down, up):
        return functional_call(adapter, {"down": down, "up": up}, h)

    assert torch.autograd.gradcheck(output, (h, adapter.down, adapter.up), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "wrong", [{"adapter_dim": 0}, {"topk_ratio": 0.0}, {"topk_ratio": 1.1}, {"temperature": 0.0}]
)
def test_settings_out_of_range_are_refused(wrong):
    for make in (TopKGate, lambda **settings: SparseAdapter(4, **settings)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make(**wrong)
    with pytest.raises(ConfigError, match="dropout"):
        SparseAdapter(4, dropout=-0.5)
    with pytest.raises(ConfigError, match="hidden_size"):
        SparseAdapter(0)
    with pytest.raises(ConfigError, match=r"h is \[..., 4\]"):
        SparseAdapter(4)(torch.zeros(1, 2, 3))
