"""Each linear adapter in JAX against the reference: outputs and all vector-Jacobian products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hylorada_torch
from hylorada_jax.modules.linear import (
    DoRALinear,
    HyLoRADALinear,
    HyLoRADAUnified,
    HyLoRADAv2Linear,
    LoRALinear,
)
from hylorada_jax.modules.position import PositionBias
from parity_tests.tolerances import IDENTITY, LAYER, relative_error

LAYERS = {
    "lora": (LoRALinear, hylorada_torch.LoRALinear),
    "dora": (DoRALinear, hylorada_torch.DoRALinear),
    "hylorada_v1": (HyLoRADALinear, hylorada_torch.HyLoRADALinear),
    "hylorada_v2": (HyLoRADAv2Linear, hylorada_torch.HyLoRADAv2Linear),
    "hylorada": (HyLoRADAUnified, hylorada_torch.HyLoRADAUnified),
}
STRUCTURE_DIM = 6
# How many of the leaves of v1 a kind has, and which of its own.
V1_LEAVES = {"lora": 2, "dora": 3}
OWN_LEAVES = {
    "hylorada_v2": ("scale_from_structure",),
    "hylorada": ("position_scale", "position_bias.position_bias"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn layer: its kind, its shapes, its settings."""

    kind: str
    d_in: int
    d_out: int
    rank: int
    seq: int
    alpha: float
    use_rslora: bool
    detach_norm: bool
    zero_row: bool
    seed: int

    @property
    def options(self):
        options = {"rank": self.rank, "alpha": self.alpha, "use_rslora": self.use_rslora}
        if self.kind == "hylorada_v2":
            options["structure_dim"] = STRUCTURE_DIM
        return options if self.kind == "lora" else options | {"detach_norm": self.detach_norm}

    def in_jax(self):
        """The Flax module."""
        shared = {"position_bias": PositionBias()} if self.kind == "hylorada" else {}
        return LAYERS[self.kind][0](**self.options, **shared)

    def in_torch(self, weight):
        """The reference."""
        shared = {}
        if self.kind == "hylorada":
            shared["position_bias"] = hylorada_torch.PositionBias(
                torch.promote_types(weight.dtype, torch.float32)
            )
        return LAYERS[self.kind][1](weight, **self.options, **shared)

    def draw(self):
        """(leaves, x, base_output, base_weight, cotangent, side), float64 numpy.

        side is what v2 and Unified take besides: {"structure_prior": …} or {"positions": …}.

        Far from the initial values, but well conditioned, so that a difference is one of the formulas and not
        of terms that cancel: the update has 0.3 of W's length in every row, no part of B is lost in B·A, the
        magnitudes lie above ‖W + sBA‖, and the cotangent goes along with the output.
        """
        rng = np.random.default_rng(self.seed)
        scale = self.alpha / (np.sqrt(self.rank) if self.use_rslora else self.rank)
        weight = rng.normal(size=(self.d_out, self.d_in)) / np.sqrt(self.d_in)
        if self.zero_row:
            weight[self.d_out // 2] = 0
        length = np.linalg.norm(weight, axis=1, keepdims=True)
        length[length == 0] = 1
        lora_A = rng.normal(size=(self.rank, self.d_in)) / np.sqrt(self.d_in)
        lora_B = rng.normal(size=(self.d_out, self.d_in)) @ lora_A.T
        lora_B *= 0.3 * length / (scale * np.linalg.norm(lora_B @ lora_A, axis=1, keepdims=True))
        leaves = {
            "lora_A": lora_A,
            "lora_B": lora_B,
            "magnitude": rng.uniform(2, 3, self.d_out) * length[:, 0],
            "magnitude_gate": rng.uniform(0.5, 3),
            "residual_weight": rng.normal(),
        }
        own = {
            "scale_from_structure": rng.normal(size=STRUCTURE_DIM),
            "position_scale": rng.normal(),
            "position_bias.position_bias": rng.uniform(0.5, 2, 64),
        }
        leaves = dict(list(leaves.items())[: V1_LEAVES.get(self.kind)])
        leaves |= {name: own[name] for name in OWN_LEAVES.get(self.kind, ())}
        side: dict[str, np.ndarray] = {}
        if self.kind == "hylorada_v2":
            side["structure_prior"] = rng.uniform(0.1, 1, (2, self.seq, STRUCTURE_DIM))
        if self.kind == "hylorada":
            side["positions"] = rng.integers(100, size=(2, self.seq))
        x = rng.normal(size=(2, self.seq, self.d_in))
        base_output = rng.normal(size=(2, self.seq, self.d_out))
        output = base_output + scale * x @ lora_A.T @ lora_B.T
        cotangent = output * rng.uniform(0.5, 1.5, output.shape)
        return leaves, x, base_output, weight, cotangent, side


CASES = st.builds(
    Case,
    kind=st.sampled_from(sorted(LAYERS)),
    d_in=st.integers(1, 24),
    d_out=st.integers(2, 24),
    rank=st.integers(1, 28),
    seq=st.integers(1, 5),
    alpha=st.floats(0.25, 64),
    use_rslora=st.booleans(),
    detach_norm=st.booleans(),
    zero_row=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def in_torch(case, values, dtype, weight_dtype):
    """Output and gradients of the reference, by name."""
    leaves, x, base_output, weight, cotangent, side = values
    weight = torch.tensor(weight, dtype=getattr(torch, weight_dtype))
    layer = case.in_torch(weight)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            assert parameter.dtype == getattr(torch, dtype)
            parameter.copy_(torch.tensor(leaves[name], dtype=torch.float64))
    inputs = {
        name: torch.tensor(value, dtype=getattr(torch, dtype), requires_grad=True)
        for name, value in differentiable(x, base_output, side).items()
    }
    positions = {name: torch.tensor(value) for name, value in side.items() if name == "positions"}
    y = layer(base_weight=weight, **inputs, **positions)
    y.backward(torch.tensor(cotangent, dtype=y.dtype))
    gradients = {name: tensor.grad for name, tensor in (*inputs.items(), *layer.named_parameters())}
    return {name: result.numpy() for name, result in {"y": y.detach(), **gradients}.items()}


def in_jax(case, values, dtype, weight_dtype):
    """Output and gradients of the Flax module, by name."""
    leaves, x, base_output, weight, cotangent, side = values
    layer, weight = case.in_jax(), jnp.asarray(weight, weight_dtype)
    positions = {name: value for name, value in side.items() if name == "positions"}
    leaves, inputs, cotangent = jax.tree.map(
        lambda value: jnp.asarray(value, dtype), (leaves, differentiable(x, base_output, side), cotangent)
    )

    @jax.jit
    def run(leaves, inputs, cotangent):
        def output(leaves, inputs):
            params = traverse_util.unflatten_dict(leaves, sep=".")
            return layer.apply({"params": params}, base_weight=weight, **inputs, **positions)

        y, pull_back = jax.vjp(output, leaves, inputs)
        leaf_gradients, input_gradients = pull_back(cotangent)
        return {"y": y, **input_gradients, **leaf_gradients}

    return run(leaves, inputs, cotangent)


def differentiable(x, base_output, side):
    """The inputs that have a gradient, by name."""
    prior = {name: value for name, value in side.items() if name == "structure_prior"}
    return {"x": x, "base_output": base_output, **prior}


def errors(case, dtype, weight_dtype, values=None):
    """The relative error of the output and of every gradient, by name."""
    values = case.draw() if values is None else values
    expected = in_torch(case, values, dtype, weight_dtype)
    with jax.enable_x64(dtype == "float64"):
        got = in_jax(case, values, dtype, weight_dtype)
        assert {name: str(value.dtype) for name, value in got.items()} == dict.fromkeys(expected, dtype)
        return {name: relative_error(got[name], value) for name, value in expected.items()}


# Each kind, rank > d_in, rank 1, one token, d_in 1, zero rows, both rules for s and for n; then 15 drawn.
@settings(max_examples=15, deadline=None, derandomize=True)
@example(Case("hylorada_v1", 5, 9, 12, 1, 16.0, True, False, True, 0))
@example(Case("hylorada_v1", 1, 4, 1, 3, 0.5, False, True, True, 1))
@example(Case("dora", 7, 3, 9, 1, 8.0, False, False, True, 2))
@example(Case("dora", 16, 8, 1, 4, 1.0, True, True, False, 3))
@example(Case("lora", 3, 6, 4, 2, 32.0, True, False, True, 4))
@example(Case("hylorada_v2", 6, 5, 3, 4, 8.0, True, False, True, 5))
@example(Case("hylorada", 6, 5, 3, 4, 8.0, False, True, False, 6))
@given(CASES)
def test_float64(case):
    found = errors(case, "float64", "float64")
    assert max(found.values()) <= LAYER["float64"], found


@settings(max_examples=15, deadline=None, derandomize=True)
@example(Case("hylorada_v1", 5, 9, 12, 1, 16.0, True, False, True, 0), "bfloat16")
@example(Case("dora", 7, 3, 9, 1, 8.0, False, False, True, 2), "float32")
@given(CASES, st.sampled_from(["float32", "bfloat16"]))
def test_float32_also_over_a_bfloat16_weight(case, weight_dtype):
    found = errors(case, "float32", weight_dtype)
    assert max(found.values()) <= LAYER["float32"], found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [3, 9])
def test_fresh_layers_agree_in_all_but_the_random_lora_a(kind, rank):
    case = Case(kind, 5, 7, rank, 2, 4.0, False, False, False, 0)
    _, x, base_output, weight, _, side = case.draw()
    reference = case.in_torch(torch.tensor(weight))
    with jax.enable_x64(True):
        inputs = x, base_output, weight, *side.values()
        y, variables = case.in_jax().init_with_output(jax.random.key(0), *inputs)
        leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, variables["params"]), sep=".")
    expected = {name: value.detach().numpy() for name, value in reference.named_parameters()}
    assert {name: leaf.shape for name, leaf in leaves.items()} == {n: v.shape for n, v in expected.items()}
    assert relative_error(y, base_output) <= IDENTITY
    pair = leaves.pop("lora_A"), expected.pop("lora_A")
    if kind not in V1_LEAVES:
        for matrix in pair:
            gram = matrix @ matrix.T if rank <= 5 else matrix.T @ matrix
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)  # JAX draws it in float32
    else:
        # Uniform on ±1/√d_in, of which 1/√3 is the standard deviation; 15 draws or more come within a half.
        for matrix in pair:
            assert np.abs(matrix).max() <= 5**-0.5
            assert matrix.std() == pytest.approx(5**-0.5 / 3**0.5, rel=0.5)
    for name, value in expected.items():
        assert relative_error(leaves[name], value) <= IDENTITY, name


@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_layer_over_a_zero_row(kind):
    """B starts at zero, so that here not only m₀ but n is zero; relative_error asks for finite values."""
    case = Case(kind, 5, 7, 3, 2, 4.0, False, False, True, 0)
    _, x, base_output, weight, cotangent, side = case.draw()
    base_output[..., 3] = 0  # as x Wᵀ is there
    reference = case.in_torch(torch.tensor(weight))
    leaves = {name: value.detach().numpy() for name, value in reference.named_parameters()}
    found = errors(case, "float64", "float64", (leaves, x, base_output, weight, cotangent, side))
    assert max(found.values()) <= LAYER["float64"], found


# The special cases in JAX; hylorada_torch/linear_test.py shows the same of the reference.

VALUES = Case("hylorada_v1", 5, 7, 3, 2, 4.0, False, False, False, 0).draw()
OPEN = 1e4  # a sigmoid input at which σ is exactly 1, and at its negative exactly 0


def jax_output(kind, **changed):
    """The output of a layer in float64, with some leaves changed."""
    leaves, x, base_output, weight, *_ = VALUES
    with jax.enable_x64(True):
        x, base_output, weight = (jnp.asarray(value) for value in (x, base_output, weight))
        layer = LAYERS[kind][0](rank=3, alpha=4.0)
        return np.asarray(layer.apply({"params": {**leaves, **changed}}, x, base_output, weight))


def test_hylorada_with_full_residual_is_lora():
    got = jax_output("hylorada_v1", residual_weight=OPEN)
    np.testing.assert_array_equal(got, jax_output("lora"))


def test_hylorada_with_an_open_gate_and_no_residual_is_dora():
    got = jax_output("hylorada_v1", magnitude_gate=OPEN, residual_weight=-OPEN)
    np.testing.assert_array_equal(got, jax_output("dora"))


def test_a_trained_hylorada_layer_collapses_to_a_dora_layer():
    leaves, _, _, weight, *_ = VALUES
    g, beta = (1 / (1 + np.exp(-leaves[name])) for name in ("magnitude_gate", "residual_weight"))
    n = np.linalg.norm(weight + 4 / 3 * leaves["lora_B"] @ leaves["lora_A"], axis=1)
    m = g * leaves["magnitude"] + (1 - g) * np.linalg.norm(weight, axis=1)
    got = jax_output("dora", magnitude=(1 - beta) * m + beta * n)
    assert relative_error(got, jax_output("hylorada_v1")) <= IDENTITY
