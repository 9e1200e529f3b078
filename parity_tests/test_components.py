"""Every component besides the linear adapters, in JAX against the reference: outputs and all gradients."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hylorada_torch
from hylorada_jax.math import position as jax_position
from hylorada_jax.modules.attention import DirectAttentionAdapter, PositionalDAA, ShiftedSparseAttention
from hylorada_jax.modules.position import PositionBias
from hylorada_jax.modules.sparse import SparseAdapter, TopKGate
from hylorada_jax.modules.structure import StructureEncoder, TemporalStructureEncoder
from hylorada_torch import position as torch_position
from parity_tests.tolerances import LAYER, relative_error


@dataclasses.dataclass
class Case:
    """One component in both frameworks, and one call of it.

    Args:
        reference: the torch module; its parameters are drawn here.
        module: the Flax module.
        inputs: what it is called with, by name; the floats are differentiated.
        keep: multiplies the output, 0 where it means nothing.
    """

    reference: torch.nn.Module
    module: nn.Module
    inputs: dict[str, np.ndarray]
    keep: Any = 1.0


def position_bias(rng, dtype):
    positions = rng.integers(40_000, size=(2, rng.integers(1, 9)))
    return Case(hylorada_torch.PositionBias(), PositionBias(), {"positions": positions})


def scores(rng):
    """Away from 0, so that no gradient is a sum of terms which cancel."""
    return 2 + rng.normal(size=(2, *rng.integers(1, 5, size=3)))


def direct_attention(rng, dtype):
    per_head, S = bool(rng.integers(2)), scores(rng)
    arguments = S.shape[1], per_head
    reference = hylorada_torch.DirectAttentionAdapter(*arguments)
    return Case(reference, DirectAttentionAdapter(*arguments), {"scores": S})


def positional_attention(rng, dtype):
    per_head, S = bool(rng.integers(2)), scores(rng)
    q, k = (rng.integers(40_000, size=(2, length)) for length in S.shape[2:])
    arguments = S.shape[1], per_head
    inputs = {"scores": S, "query_positions": q, "key_positions": k}
    return Case(hylorada_torch.PositionalDAA(*arguments), PositionalDAA(*arguments), inputs)


def gate(rng, dtype):
    options = {"adapter_dim": int(rng.integers(1, 20)), "topk_ratio": rng.uniform(0.01, 1)}
    options["temperature"] = rng.uniform(0.5, 2)
    return Case(hylorada_torch.TopKGate(**options), TopKGate(**options), {})


def sparse_adapter(rng, dtype):
    options = {"adapter_dim": int(rng.integers(1, 20)), "topk_ratio": rng.uniform(0.01, 1)}
    hidden = int(rng.integers(1, 9))
    h = rng.normal(size=(2, rng.integers(1, 5), hidden))
    return Case(hylorada_torch.SparseAdapter(hidden, **options), SparseAdapter(**options), {"h": h})


def structure_encoder(rng, dtype, kinds=(hylorada_torch.StructureEncoder, StructureEncoder), **options):
    options |= {
        "hidden_size": int(rng.integers(1, 9)),
        "encoding_dim": 2 * int(rng.integers(3, 9)),  # a LayerNorm of two features has no gradient
        "num_buckets": int(rng.integers(2, 70)),
        "max_structure_types": int(rng.integers(1, 9)),
    }
    shape = (2, rng.integers(1, 9))
    # The sine of a large angle has no digits left in float32.
    positions = rng.uniform(0, 10_000 if dtype == "float64" else 10, shape)
    inputs = {"positions": positions if rng.integers(2) else positions.astype(int)}
    if rng.integers(2):
        inputs["structure_ids"] = rng.integers(-2, 12, shape)
    if rng.integers(2):
        inputs["seq_len"] = int(rng.integers(1, 5000))
    return Case(kinds[0](**options), kinds[1](**options), inputs)


def temporal_encoder(rng, dtype):
    kinds = hylorada_torch.TemporalStructureEncoder, TemporalStructureEncoder
    return structure_encoder(rng, dtype, kinds, num_periods=int(rng.integers(1, 5)))


def shifted_sparse_attention(rng, dtype):
    kv_heads, repeats = rng.integers(1, 4, size=2)
    heads = max(kv_heads * repeats, 2 * kv_heads)
    tokens = (2, rng.integers(1, 14))
    group, ratio = [(2, 0.5), (4, 0.5), (4, 0.25), (6, 1 / 3)][rng.integers(4)]
    inputs = {
        name: rng.normal(size=(*tokens, number, 4))
        for name, number in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    }
    keep: Any = 1.0
    if rng.integers(2):
        inputs["segment_ids"] = np.sort(rng.integers(1, 4, tokens), axis=1)
    if rng.integers(2):
        inputs["key_valid"] = rng.integers(4, size=tokens) > 0
        keep = inputs["key_valid"][..., None, None]  # a query that is padding may see no key at all
    reference = hylorada_torch.ShiftedSparseAttention(group, ratio)
    return Case(reference, ShiftedSparseAttention(group, ratio), inputs, keep)


COMPONENTS = {
    function.__name__: function
    for function in (
        position_bias,
        direct_attention,
        positional_attention,
        gate,
        sparse_adapter,
        structure_encoder,
        temporal_encoder,
        shifted_sparse_attention,
    )
}


def differentiable(case):
    """The inputs that have a gradient, and the others."""
    data = {
        name: value
        for name, value in case.inputs.items()
        if np.asarray(value).dtype != float or name == "positions"
    }
    return {name: value for name, value in case.inputs.items() if name not in data}, data


def in_torch(case, dtype, rng):
    """Output, gradients, leaves and cotangent; the last two are drawn here."""
    reference = case.reference.to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.tensor(0.5 * rng.normal(size=parameter.shape)))
    moving, fixed = differentiable(case)
    inputs = {
        name: torch.tensor(value, dtype=getattr(torch, dtype), requires_grad=True)
        for name, value in moving.items()
    }
    others = {
        name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in fixed.items()
    }
    y = reference(**inputs, **others) * torch.tensor(case.keep, dtype=getattr(torch, dtype))
    # Along with the output, so that the gradient of a scalar is no sum of terms which cancel.
    cotangent = y.detach().numpy() * rng.uniform(0.5, 1.5, y.shape)
    leaves = {name: parameter.detach().numpy().copy() for name, parameter in reference.named_parameters()}
    y.backward(torch.tensor(cotangent, dtype=y.dtype)) if y.requires_grad else None
    tensors = {**inputs, **dict(reference.named_parameters())}
    gradients = {
        name: np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        for name, tensor in tensors.items()
    }
    return {"y": y.detach().numpy(), **gradients}, leaves, cotangent


def in_jax(case, dtype, leaves, cotangent):
    """Output and gradients."""
    moving, fixed = differentiable(case)
    inputs = jax.tree.map(lambda value: jnp.asarray(value, dtype), moving)
    keep = jnp.asarray(case.keep, dtype)

    @jax.jit
    def run(leaves, inputs, cotangent):
        def output(leaves, inputs):
            return case.module.apply({"params": leaves}, **inputs, **fixed) * keep

        y, pull_back = jax.vjp(output, leaves, inputs)
        leaf_gradients, input_gradients = pull_back(cotangent)
        return {"y": y, **input_gradients, **leaf_gradients}

    return run(leaves, inputs, jnp.asarray(cotangent, dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", COMPONENTS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_component(name, dtype, seed):
    rng = np.random.default_rng(seed)
    case = COMPONENTS[name](rng, dtype)
    expected, leaves, cotangent = in_torch(case, dtype, rng)
    with jax.enable_x64(dtype == "float64"):
        got = in_jax(case, dtype, leaves, cotangent)
        assert {name: str(value.dtype) for name, value in got.items()} == dict.fromkeys(expected, dtype)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= LAYER[dtype], errors


@pytest.mark.parametrize("name", COMPONENTS)
def test_fresh_components_have_the_same_leaves(name):
    case = COMPONENTS[name](np.random.default_rng(0), "float32")
    expected = {name: value.detach().numpy() for name, value in case.reference.named_parameters()}
    variables = jax.jit(lambda key: case.module.init(key, **case.inputs))(jax.random.key(0))
    leaves = variables.get("params", {})
    assert {name: leaf.shape for name, leaf in leaves.items()} == {n: v.shape for n, v in expected.items()}
    for leaf, value in expected.items():
        if np.unique(value).size == 1 or leaf == "periods":  # not drawn at random
            np.testing.assert_array_equal(leaves[leaf], value, leaf)


def test_buckets_are_equal_everywhere():
    positions = np.arange(jax_position.MAX_DISTANCE)
    offsets = np.arange(1 - jax_position.MAX_DISTANCE, jax_position.MAX_DISTANCE)
    for tables, where in (("position_buckets", positions), ("relative_buckets", offsets)):
        got, expected = getattr(jax_position, tables)(), getattr(torch_position, tables)(where)
        np.testing.assert_array_equal(got, expected)
    for count in (2, 7, 64):
        expected = torch_position.structure_buckets(offsets, count)
        np.testing.assert_array_equal(jax_position.structure_buckets(count), expected)
