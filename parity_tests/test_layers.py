"""Every registered layer against the reference, in three precisions; and the laws that bind the layers."""

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

import hylorada_jax
import hylorada_jax.nnx
import hylorada_torch
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math import position as jax_position
from hylorada_torch import position as torch_position
from parity_tests.layers import LAYERS, LINEAR_EDGES, Case, Draw
from parity_tests.measure import DTYPES, errors, jax_side, measure_layer, measured_in, precision
from parity_tests.tolerances import FUSION, IDENTITY, LAYER, relative_error

DRAWS = st.builds(
    Draw,
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([2, 1, 3]),  # the first draw is the simplest, which should hold numbers
    seq=st.integers(1, 5),
    d_in=st.integers(1, 24),
    d_out=st.integers(2, 24),
    rank=st.integers(1, 28),
    alpha=st.floats(0.25, 64),
    use_rslora=st.booleans(),
    detach_norm=st.booleans(),
    zero_row=st.booleans(),
    cancelling=st.booleans(),
    input_exponent=st.integers(-6, 6),
    weight_exponent=st.integers(-4, 4),
)
# Float64 shows a wrong formula, however it is compiled; the others measure rounding, compiled as for users.
ROUNDS = (pytest.mark.slow, pytest.mark.optimized)
MARKS: dict[str, Any] = {"float64": (), "float32": ROUNDS, "bfloat16": ROUNDS}
EDGES = [
    pytest.param(name, draw, dtype, id=f"{name}-{edge}-{dtype}", marks=MARKS[dtype])
    for name, layer in LAYERS.items()
    for edge, draw in layer.edges.items()
    for dtype in DTYPES
    if measured_in(layer.case(draw), dtype)
]


def public_layers(package, kind):
    """The layers that a package exports; a whole model, and what attaches a layer to one, are none."""
    exported = {getattr(package, name) for name in package.__all__}
    wrappers = {hylorada_torch.HyLoRADAModel, hylorada_torch.AdaptedLinear}
    # Without leaves of their own.
    hooks = {hylorada_jax.nnx.Attention, hylorada_jax.nnx.AttentionScores}
    return {
        value for value in exported - wrappers - hooks if isinstance(value, type) and issubclass(value, kind)
    }


@pytest.mark.parametrize(
    ("package", "kind", "side"),
    [
        (hylorada_jax, nn.Module, "jax"),
        (hylorada_jax.nnx, nnx.Module, "jax"),
        (hylorada_torch, torch.nn.Module, "torch"),
    ],
)
def test_every_public_layer_is_registered(package, kind, side):
    registered = {getattr(layer, side) for layer in LAYERS.values()}
    assert public_layers(package, kind) == {cls for cls in registered if issubclass(cls, kind)}


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.in_nnx])
def test_nnx_layers_take_torchs_arguments_in_the_same_order(name):
    sides = (inspect.signature(cls.__init__).parameters for cls in (LAYERS[name].jax, LAYERS[name].torch))
    ours, theirs = (
        [key for key, value in side.items() if value.kind is value.POSITIONAL_OR_KEYWORD] for side in sides
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ["num_periods", "hiden_size"])
def test_an_nnx_encoder_takes_no_setting_that_it_does_not_have(name):
    with pytest.raises(TypeError, match=rf"StructureEncoder.*'{name}'"):
        hylorada_jax.nnx.StructureEncoder(rngs=nnx.Rngs(0), **{name: 2})


def check(name, draw, dtype):
    found = measure_layer(name, draw, dtype)
    assert all(error <= budget for error, budget in found.values()), found


@pytest.mark.parametrize(("name", "draw", "dtype"), EDGES)
def test_edge(name, draw, dtype):
    check(name, draw, dtype)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=MARKS[dtype]) for dtype in DTYPES])
@pytest.mark.parametrize("name", LAYERS)
# Two of each here, thirteen layers of two APIs in three precisions; the profile "search" tries hundreds.
@settings(max_examples=min(2, settings().max_examples) if settings().derandomize else settings().max_examples)
@given(draw=DRAWS)
def test_drawn(name, dtype, draw):
    if measured_in(LAYERS[name].case(draw), dtype):
        check(name, draw, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_has_the_same_dtype_in_both_frameworks(name, dtype):
    """Beside leaves in float32, which are wider than hidden states in bfloat16."""
    case = LAYERS[name].case(Draw())
    hidden = (*case.differentiated, "base_weight")
    inputs = {key: torch.as_tensor(value) for key, value in case.inputs.items() if np.ndim(value)}
    options = {key: value for key, value in case.inputs.items() if key not in inputs}
    of_torch = {
        key: value.to(getattr(torch, dtype if key in hidden else "float32"))
        if value.is_floating_point()
        else value
        for key, value in inputs.items()
    }
    y = case.reference.float()(**of_torch, **options)
    run, arguments = jax_side(case, dtype)
    with precision(dtype):
        expected = jax.eval_shape(run, *arguments)["y"]
    assert str(y.dtype) == f"torch.{expected.dtype}"


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_call_compiles_nothing_and_eager_is_jit(name):
    case = LAYERS[name].case(Draw())
    with precision("float64"):
        run, arguments = jax_side(case, "float64")
        compiled = jax.jit(run)
        first, doubled = compiled(*arguments), jax.tree.map(lambda value: 2 * value, arguments)
        compiled(*doubled)
        assert compiled._cache_size() == 1  # type: ignore[attr-defined]
        eager = run(*arguments)
    assert all(relative_error(eager[result], value) <= FUSION for result, value in first.items())


@pytest.mark.parametrize("rank", [3, 9])
@pytest.mark.parametrize("name", LAYERS)
def test_fresh_layers_agree_in_all_but_random_leaves(name, rank):
    layer = LAYERS[name]
    case = layer.case(Draw(d_in=5, d_out=7, rank=rank))
    expected = {leaf: value.detach().numpy() for leaf, value in case.reference.named_parameters()}
    with precision("float64"):
        variables = jax.jit(lambda key: case.module.init(key, **case.inputs))(jax.random.key(0))
    leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, variables.get("params", {})), sep=".")
    assert {leaf: value.shape for leaf, value in leaves.items()} == {
        leaf: value.shape for leaf, value in expected.items()
    }
    if "lora_A" in expected:
        check_start(layer, leaves.pop("lora_A"), expected.pop("lora_A"))
    for leaf, value in expected.items():
        if np.unique(value).size == 1 or leaf in ("magnitude", "periods"):  # not drawn at random
            assert relative_error(leaves[leaf], value) <= IDENTITY, leaf


def check_start(layer, *pair):
    """Of A: orthogonal in HyLoRADA, else uniform on ±1/√d_in with d_in = 5."""
    for matrix in pair:
        if layer.torch in (hylorada_torch.LoRALinear, hylorada_torch.DoRALinear):
            # The standard deviation of that is 1/√(3·5); 15 draws or more come within a half.
            assert np.abs(matrix).max() <= 5**-0.5
            assert matrix.std() == pytest.approx(15**-0.5, rel=0.5)
        else:
            gram = matrix @ matrix.T if len(matrix) <= 5 else matrix.T @ matrix
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)  # JAX draws it in float32


LINEAR = [name for name, layer in LAYERS.items() if layer.edges is LINEAR_EDGES]


@pytest.mark.parametrize("name", LINEAR)
def test_a_fresh_layer_over_a_zero_row(name):
    """B starts at zero, so that here not only m₀ but n is zero; relative_error asks for finite values."""
    case = LAYERS[name].case(Draw(zero_row=True))
    case.leaves = {leaf: value.detach().numpy() for leaf, value in case.reference.named_parameters()}
    case.inputs["base_output"][..., -1] = 0  # as x Wᵀ is there
    found = errors(case, "float64")
    assert max(found.values()) <= LAYER["float64"], found


# The special cases in JAX; hylorada_torch/linear_test.py shows the same of the reference.

V1 = LAYERS["hylorada_v1"].case(Draw(alpha=4.0))
OPEN = 1e4  # a sigmoid input at which σ is exactly 1, and at its negative exactly 0


def output(name, **changed):
    """The output of a layer in float64 at the leaves of V1, some of them changed."""
    case: Case = LAYERS[name].case(Draw(alpha=4.0))
    leaves = V1.leaves | {leaf: np.asarray(value) for leaf, value in changed.items()}
    case = dataclasses.replace(case, inputs=V1.inputs, leaves={leaf: leaves[leaf] for leaf in case.leaves})
    with precision("float64"):
        run, arguments = jax_side(case, "float64")
        return np.asarray(run(*arguments)["y"])


def test_hylorada_with_full_residual_is_lora():
    np.testing.assert_array_equal(output("hylorada_v1", residual_weight=OPEN), output("lora"))


def test_hylorada_with_an_open_gate_and_no_residual_is_dora():
    got = output("hylorada_v1", magnitude_gate=OPEN, residual_weight=-OPEN)
    np.testing.assert_array_equal(got, output("dora"))


def test_a_trained_hylorada_layer_collapses_to_a_dora_layer():
    leaves, weight = V1.leaves, V1.inputs["base_weight"]
    g, beta = (1 / (1 + np.exp(-leaves[name])) for name in ("magnitude_gate", "residual_weight"))
    n = np.linalg.norm(weight + 4 / 3 * leaves["lora_B"] @ leaves["lora_A"], axis=1)
    m = g * leaves["magnitude"] + (1 - g) * np.linalg.norm(weight, axis=1)
    got = output("dora", magnitude=(1 - beta) * m + beta * n)
    assert relative_error(got, output("hylorada_v1")) <= IDENTITY


# Of a layer: its arguments and the shapes of a call that it takes; those that it refuses, and with what.
_LINEAR = (5, 7), {"x": (2, 4, 5), "base_output": (2, 4, 7), "base_weight": (7, 5)}
_PRIOR = (5, 7), _LINEAR[1] | {"structure_prior": (2, 4, 32)}
_SPARSE = (5,), {"h": (2, 4, 5)}
_GROUPS = (4,), {"query": (2, 6, 4, 8), "key": (2, 6, 2, 8), "value": (2, 6, 2, 8)}
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], dict[str, Any], type[Exception]]] = {
    **{
        f"{name}, {what}": (name, *_LINEAR, wrong, ConfigError)
        for name in ("lora", "hylorada_v2", "hylorada")
        for what, wrong in (
            ("W transposed", {"base_weight": (5, 7)}),
            ("an output of one feature", {"base_output": (2, 4, 1)}),
            ("an output of one row", {"base_output": (1, 4, 7)}),
            ("a narrower x", {"x": (2, 4, 3)}),
        )
    },
    "a narrower prior": ("hylorada_v2", *_PRIOR, {"structure_prior": (2, 4, 31)}, DataError),
    **{
        f"{name}, {what}": (name, arguments, {"scores": (2, arguments[0], 3, 3)}, wrong, ConfigError)
        for name in ("direct_attention", "positional_attention")
        for what, arguments, wrong in (
            ("fewer heads", (4,), {"scores": (2, 3, 3, 3)}),
            ("fewer heads, one value for all", (4, False), {"scores": (2, 3, 3, 3)}),
            ("heads for one", (1,), {"scores": (2, 3, 3, 3)}),
            ("three axes", (3,), {"scores": (3, 3, 3)}),
        )
    },
    "a wider h": ("sparse_adapter", *_SPARSE, {"h": (2, 4, 6)}, ConfigError),
    **{
        what: ("shifted_sparse_attention", *_GROUPS, wrong, error)
        for what, wrong, error in (
            ("uneven sharing", {"query": (2, 6, 3, 8)}, ConfigError),
            ("one head", {"query": (2, 6, 1, 8), "key": (2, 6, 1, 8), "value": (2, 6, 1, 8)}, ConfigError),
            ("narrower heads", {"query": (2, 6, 4, 7)}, DataError),
            ("more keys", {"key": (2, 7, 2, 8), "value": (2, 7, 2, 8)}, DataError),
            ("fewer values", {"value": (2, 6, 1, 8)}, DataError),
            ("heads not split", {"query": (2, 6, 8), "key": (2, 6, 8), "value": (2, 6, 8)}, DataError),
            ("keys not split", {"query": (2, 6, 4, 4), "key": (2, 6, 4), "value": (2, 6, 4)}, DataError),
            ("padding of another row", {"key_valid": (1, 6)}, DataError),
        )
    },
}
CALLS = [
    pytest.param(f"{side}{name}", *rest, id=f"{side}{what}")
    for what, (name, *rest) in REFUSED.items()
    for side in ("", "nnx ")
    if side or name != "sparse_adapter"  # Linen's reads its width off h
]


@pytest.mark.parametrize(("name", "arguments", "taken", "wrong", "error"), CALLS)
def test_both_packages_refuse_the_same_calls_alike(name, arguments, taken, wrong, error):
    layer = LAYERS[name]

    def of_torch(shapes):
        layer.torch(*arguments)(**{key: torch.ones(shape) for key, shape in shapes.items()})

    def of_jax(shapes):
        inputs = {key: jnp.ones(shape) for key, shape in shapes.items()}
        jax.eval_shape(lambda: layer.make(*arguments).init(jax.random.key(0), **inputs))

    for call in (of_torch, of_jax):
        call(taken)
        with pytest.raises(error):
            call(taken | wrong)


def test_a_sparse_adapter_of_no_features_is_refused_everywhere():
    for make in (
        hylorada_torch.SparseAdapter,
        lambda width: hylorada_jax.nnx.SparseAdapter(width, rngs=nnx.Rngs(0)),
        lambda width: hylorada_jax.SparseAdapter().init(jax.random.key(0), jnp.ones((1, width))),
    ):
        with pytest.raises(ConfigError, match="hidden_size"):
            make(0)


def test_buckets_are_equal_everywhere():
    positions = np.arange(jax_position.MAX_DISTANCE)
    offsets = np.arange(1 - jax_position.MAX_DISTANCE, jax_position.MAX_DISTANCE)
    for tables, where in (("position_buckets", positions), ("relative_buckets", offsets)):
        got, expected = getattr(jax_position, tables)(), getattr(torch_position, tables)(where)
        np.testing.assert_array_equal(got, expected)
    for count in (2, 7, 64, 300):
        expected = torch_position.position_buckets(positions, count)
        np.testing.assert_array_equal(jax_position.position_buckets(count), expected)
        expected = torch_position.structure_buckets(offsets, count)
        np.testing.assert_array_equal(jax_position.structure_buckets(count), expected)
