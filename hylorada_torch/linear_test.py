import copy
import functools
import math

import numpy as np
import pytest
import torch

from hylorada_jax.errors import ConfigError, DataError, ModelError
from hylorada_torch.linear import (
    DoRALinear,
    HyLoRADALinear,
    HyLoRADAUnified,
    HyLoRADAv2Linear,
    LoRALinear,
)
from hylorada_torch.position import PositionBias, position_buckets

KINDS = (LoRALinear, DoRALinear, HyLoRADALinear)
# Float64 sums of a few dozen products of order 1, in two orders.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)


def case(kind, *, rank=3, d_in=5, d_out=7, seed=0, dtype=torch.float64, **options):
    """An adapter with random parameters (not the initial ones), and what it is called with."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    adapter = kind(d_in, d_out, rank, 4.0, generator=generator, dtype=wide, **options)
    if isinstance(adapter, DoRALinear):
        adapter.init_magnitude(weight)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 4, d_in, generator=generator, dtype=torch.float64).to(dtype)
    return adapter, x, x @ weight.T, weight


def copy_shared(source, target):
    """Give `target` the parameters that it has in common with `source`."""
    target.load_state_dict(
        {name: source.state_dict()[name] for name in target.state_dict() if name in source.state_dict()},
        strict=False,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_initial_output_is_the_base_output(kind, rank):
    weight, x = torch.randn(7, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    assert_close(kind(5, 7, rank, dtype=torch.float64)(x, x @ weight.T, weight), x @ weight.T)


def test_parameters_and_their_initial_values():
    weight = torch.randn(7, 5, dtype=torch.bfloat16)
    norms = weight.double().norm(dim=1)
    expected = ["lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight"]
    for kind, count in zip(KINDS, (2, 3, 5), strict=True):
        adapter = kind(5, 7, rank=3)
        adapter(torch.zeros(1, 1, 5), torch.zeros(1, 1, 7), weight)
        values = dict(adapter.named_parameters())
        assert list(values) == expected[:count]
        assert {value.dtype for value in values.values()} == {torch.float32}
        assert not values["lora_B"].any()
        if "magnitude" in values:
            assert_close(values["magnitude"].double(), norms, rtol=1e-6, atol=0)  # float32's sum
    assert (values["magnitude_gate"].item(), values["residual_weight"].item()) == (0.0, pytest.approx(0.1))


def test_kaiming_bound_and_orthonormal_rows():
    # Kaiming-uniform with a = √5 is uniform on ±1/√d_in; 400 draws come within 2% of the bound.
    bound = 1 / math.sqrt(50)
    largest = LoRALinear(50, 6, rank=8).lora_A.abs().max().item()
    assert 0.98 * bound < largest <= bound
    a = HyLoRADALinear(50, 6, rank=8, dtype=torch.float64).lora_A
    assert_close(a @ a.T, torch.eye(8, dtype=torch.float64))
    a = HyLoRADALinear(50, 6, rank=60, dtype=torch.float64).lora_A
    assert_close(a.T @ a, torch.eye(50, dtype=torch.float64))


@pytest.mark.parametrize("kind", [*KINDS, HyLoRADAv2Linear, HyLoRADAUnified])
def test_the_start_of_a_is_a_setting(kind):
    a = kind(50, 6, lora_A_init="orthogonal", lora_A_gain=3.0, dtype=torch.float64).lora_A
    assert_close(a @ a.T, 9 * torch.eye(8, dtype=torch.float64))
    # 400 draws of a uniform distribution on ±3/√50 come within 2 % of the bound.
    a = kind(50, 6, lora_A_init="kaiming", lora_A_gain=3.0).lora_A
    assert 0.98 * 3 / math.sqrt(50) < a.abs().max() <= 3 / math.sqrt(50)
    for wrong in (
        {"lora_A_init": "orthogonl"}, {"lora_A_gain": 0.0}, {"lora_A_gain": math.inf}, {"dropout": 1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            kind(50, 6, **wrong)


def test_a_layer_takes_its_magnitude_from_the_first_weight_alone():
    weight, x = torch.randn(7, 5), torch.randn(2, 4, 5)
    fresh = HyLoRADALinear(5, 7)
    saved = copy.deepcopy(fresh.state_dict())
    copied = copy.deepcopy(fresh)
    fresh(x, x @ weight.T, weight)
    norms = weight.norm(dim=1)
    torch.testing.assert_close(fresh.magnitude, norms)

    # Neither another weight nor what training makes of the magnitude starts it again.
    with torch.no_grad():
        fresh.magnitude.mul_(2)
    fresh(x, x @ weight.T, 3 * weight)
    torch.testing.assert_close(fresh.magnitude, 2 * norms)
    loaded = HyLoRADALinear(5, 7)
    loaded.load_state_dict(fresh.state_dict())
    assert torch.equal(loaded(x, x @ weight.T, weight), fresh(x, x @ weight.T, weight))
    assert torch.equal(copy.deepcopy(fresh)(x, x @ weight.T, weight), fresh(x, x @ weight.T, weight))
    by_hand = HyLoRADALinear(5, 7)
    with torch.no_grad():
        for name, value in by_hand.named_parameters():
            value.copy_(fresh.get_parameter(name))
    assert torch.equal(by_hand(x, x @ weight.T, weight), fresh(x, x @ weight.T, weight))
    with torch.no_grad():
        fresh.magnitude.fill_(math.nan)
    assert fresh(x, x @ weight.T, weight).isnan().all()  # it has diverged, and says so

    # A state, or a copy, from before the first weight meets its own; also after another was met.
    for restored in (HyLoRADALinear(5, 7), fresh):
        restored.load_state_dict(saved)
        torch.testing.assert_close(restored(x, x @ weight.T, weight), x @ weight.T)
    torch.testing.assert_close(copied(x, x @ (3 * weight).T, 3 * weight), x @ (3 * weight).T)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_checked(kind):
    x, weight = torch.randn(1, 2, 5), torch.randn(7, 5)
    y = x @ weight.T
    for wrong in ((x, y, weight.T), (x, y[..., :1], weight), (x[..., 1:], y, weight)):
        with pytest.raises(ConfigError, match=r"\(5, 7\): x is \[..., 5\]"):
            kind(5, 7)(*wrong)
    for sizes in ((0, 7, 2), (5, 0, 2), (5, 7, 0)):
        with pytest.raises(ConfigError, match="≥ 1"):
            kind(*sizes)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_output_is_the_formula_of_method_md(use_rslora):
    adapter, x, base, weight = case(HyLoRADALinear, use_rslora=use_rslora)
    W, A, B, magnitude, gate, residual = (
        t.detach().numpy()
        for t in (
            weight,
            adapter.lora_A,
            adapter.lora_B,
            adapter.magnitude,
            adapter.magnitude_gate,
            adapter.residual_weight,
        )
    )
    s = 4.0 / (math.sqrt(3) if use_rslora else 3)
    g, beta = 1 / (1 + np.exp(-gate)), 1 / (1 + np.exp(-residual))
    y = np.empty(base.shape)
    for row in range(7):
        updated = W[row] + s * B[row] @ A
        m = g * magnitude[row] + (1 - g) * math.sqrt(W[row] @ W[row])
        dora = m * updated / math.sqrt(updated @ updated)
        y[..., row] = x.numpy() @ ((1 - beta) * dora + beta * updated)
    assert_close(adapter(x, base, weight).detach(), torch.from_numpy(y))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    options = {} if kind is LoRALinear else {"detach_norm": False}
    adapter, x, base, weight = case(kind, **options)
    names = [name for name, _ in adapter.named_parameters()]

    def output(x, base, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x, base, weight))

    inputs = [t.detach().requires_grad_() for t in (x, base, *adapter.parameters())]
    assert torch.autograd.gradcheck(output, inputs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [DoRALinear, HyLoRADALinear])
def test_detach_norm_takes_the_norm_as_a_constant(kind):
    adapter, x, base, weight = case(kind, detach_norm=True)
    adapter(x, base, weight).square().sum().backward()
    scale = adapter.column_scale(weight).detach()
    lora, *_ = case(LoRALinear)
    copy_shared(adapter, lora)
    # With n constant, lora_A and lora_B see c as a constant: LoRA's gradient of Σ(c·y)².
    (lora(x, base, weight) * scale).square().sum().backward()
    for leaf in ("lora_A", "lora_B"):
        assert_close(adapter.get_parameter(leaf).grad, lora.get_parameter(leaf).grad)


def test_lora_is_the_full_residual_exactly():
    adapter, x, base, weight = case(HyLoRADALinear)
    lora, *_ = case(LoRALinear)
    copy_shared(adapter, lora)
    with torch.no_grad():
        adapter.residual_weight.fill_(math.inf)
    assert torch.equal(adapter(x, base, weight), lora(x, base, weight))


def test_dora_is_the_open_gate_without_residual_exactly():
    adapter, x, base, weight = case(HyLoRADALinear)
    dora, *_ = case(DoRALinear)
    copy_shared(adapter, dora)
    with torch.no_grad():
        adapter.magnitude_gate.fill_(math.inf)
        adapter.residual_weight.fill_(-math.inf)
    assert torch.equal(adapter(x, base, weight), dora(x, base, weight))


def test_a_trained_adapter_collapses_to_a_dora_adapter():
    adapter, x, base, weight = case(HyLoRADALinear)
    dora, *_ = case(DoRALinear)
    copy_shared(adapter, dora)
    with torch.no_grad():
        dora.magnitude.copy_(adapter.collapsed_magnitude(weight))
    assert_close(dora(x, base, weight), adapter(x, base, weight))
    assert_close(x @ adapter.merged_weight(weight).T, adapter(x, base, weight))


@pytest.mark.parametrize("kind", [HyLoRADAv2Linear, HyLoRADAUnified])
def test_what_depends_on_the_token_is_neither_merged_nor_collapsed(kind):
    shared = PositionBias(dtype=torch.float64)
    adapter, x, base, weight = case(kind, **({"position_bias": shared} if kind is HyLoRADAUnified else {}))
    live = shared.position_bias if kind is HyLoRADAUnified else adapter.scale_from_structure
    with torch.no_grad():
        live.zero_()
    assert_close(x @ adapter.merged_weight(weight).T, adapter(x, base, weight))
    with torch.no_grad():
        live[3] = 0.5
    for refused in (adapter.merged_weight, adapter.collapsed_magnitude):
        with pytest.raises(ModelError, match=kind.__name__):
            refused(weight)


def test_a_gate_that_is_all_but_shut_keeps_its_digits():
    adapter, x, base, weight = case(HyLoRADALinear, dtype=torch.float32)
    with torch.no_grad():
        adapter.residual_weight.fill_(18.0)  # 1−β is 1.5e-8, less than float32 leaves beside 1
        adapter.magnitude.mul_(1e8)
    expected = copy.deepcopy(adapter).double()(x.double(), base.double(), weight.double())
    torch.testing.assert_close(adapter(x, base, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_vanishes_has_the_length_of_its_rounding():
    weight, x = torch.randn(7, 5), torch.randn(2, 4, 5)
    adapter = DoRALinear(5, 7, rank=5, alpha=5.0, lora_A_init="orthogonal")
    adapter.init_magnitude(weight)
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(5))
        adapter.lora_B.copy_(-weight)
    torch.testing.assert_close(adapter.column_scale(weight), torch.full((7,), 2.0**23))
    assert torch.isfinite(adapter(x, x @ weight.T, weight)).all()


def test_the_output_has_the_dtype_of_the_base_output():
    adapter, x, base, weight = case(HyLoRADALinear, dtype=torch.float32)
    assert adapter(x, base.bfloat16(), weight).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_row_gives_finite_values(kind):
    weight, x = torch.randn(7, 5), torch.randn(2, 4, 5, requires_grad=True)
    weight[2] = 0
    adapter = kind(5, 7, 3)
    y = adapter(x, x @ weight.T, weight)
    assert torch.equal(y[..., 2], torch.zeros(2, 4))
    y.square().sum().backward()
    for tensor in (y, x.grad, *(parameter.grad for parameter in adapter.parameters())):
        assert torch.isfinite(tensor).all()


def test_dropout_touches_the_low_rank_path_only_and_only_in_training():
    weight, x = torch.eye(200, dtype=torch.float64), torch.ones(1, 1, 200, dtype=torch.float64)
    adapter = LoRALinear(200, 200, rank=200, alpha=200.0, dropout=0.25, dtype=torch.float64)
    with torch.no_grad():
        adapter.lora_A.copy_(weight)
        adapter.lora_B.copy_(weight)
    # δ = dropout(x), so an output is 1 + 0 or 1 + 1/(1−p).
    assert set(adapter(x, x, weight).flatten().tolist()) == {1.0, 1.0 + 1 / 0.75}
    assert torch.equal(adapter.eval()(x, x, weight), 2 * x)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32_and_rounded_once(kind):
    adapter, x, _, weight = case(kind, dtype=torch.bfloat16)
    base = x @ weight.T
    y = adapter(x, base, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, adapter(x.float(), base.float(), weight.float()).bfloat16())


# v2 and Unified: what they add to v1 is p, the scale of the update per token.


def test_the_structure_prior_scales_the_update_token_by_token():
    adapter, x, base, weight = case(HyLoRADAv2Linear, structure_dim=6)
    v1, *_ = case(HyLoRADALinear)
    copy_shared(adapter, v1)
    prior = torch.randn(2, 4, 6, dtype=torch.float64)
    p = 0.5 + 1 / (1 + np.exp(-(prior.numpy() @ adapter.scale_from_structure.detach().numpy())))
    c = v1.column_scale(weight)
    update = v1(x, base, weight) - base * c
    assert_close(adapter(x, base, weight, prior), base * c + torch.from_numpy(p)[..., None] * update)
    assert torch.equal(adapter(x, base, weight), v1(x, base, weight))
    half = prior.bfloat16()
    assert torch.equal(adapter(x, base, weight, half), adapter(x, base, weight, half.double()))
    fresh = HyLoRADAv2Linear(5, 7, structure_dim=6)
    assert fresh.scale_from_structure.tolist() == [0.0] * 6
    with pytest.raises(DataError, match="structure_dim"):
        adapter(x, base, weight, prior[..., 1:])


def test_positions_scale_the_update_token_by_token():
    shared = PositionBias(dtype=torch.float64)
    adapter, x, base, weight = case(HyLoRADAUnified, position_bias=shared)
    v1, *_ = case(HyLoRADALinear)
    copy_shared(adapter, v1)
    positions = torch.tensor([[0, 1, 40, 9], [3, 2, 2, 2000]])
    t = torch.tanh(shared.position_bias[torch.from_numpy(position_buckets(positions.numpy()))])
    p = 1 + torch.sigmoid(adapter.position_scale) * t
    c = v1.column_scale(weight)
    update = v1(x, base, weight) - base * c
    assert_close(adapter(x, base, weight, positions), base * c + p[..., None] * update)
    without, *_ = case(HyLoRADAUnified)
    copy_shared(adapter, without)
    assert torch.equal(without(x, base, weight, positions), v1(x, base, weight))
    counted = torch.arange(4).expand(2, 4)
    assert torch.equal(adapter(x, base, weight), adapter(x, base, weight, counted))
    # As many tokens as features, in one axis: neither counts for the other.
    row, output = torch.cat([x[0], x[1, :1]]), torch.cat([base[0], base[1, :1]])
    assert torch.equal(adapter(row, output, weight), adapter(row[None], output[None], weight)[0])
    with pytest.raises(DataError, match="Position ids"):
        adapter(x, base, weight, -positions)


def test_parameters_of_one_square_layer():
    def count(kind, d, **options):
        return sum(p.numel() for p in kind(d, d, 8, **options).parameters(recurse=False))

    # The table of method.md §8.
    assert count(HyLoRADALinear, 768) == 13_058
    assert count(HyLoRADAv2Linear, 768, structure_dim=32) == 13_090
    assert count(HyLoRADAUnified, 768, position_bias=PositionBias()) == 13_059
    assert sum(p.numel() for p in PositionBias().parameters()) == 64
    assert count(HyLoRADALinear, 896) == 15_234


@pytest.mark.parametrize("kind", KINDS)
def test_only_v2_takes_a_prior(kind):
    adapter, x, base, weight = case(kind)
    with pytest.raises(ConfigError, match="HyLoRADAv2Linear"):
        adapter(x, base, weight, torch.zeros(2, 4, 32))
