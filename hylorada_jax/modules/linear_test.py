"""The conditioned layers against the plain formula; parity_tests compare all layers with the reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math.position_test import position_bucket
from hylorada_jax.modules.linear import (
    DoRALinear,
    HyLoRADALinear,
    HyLoRADAUnified,
    HyLoRADAv2Linear,
    LoRALinear,
)
from hylorada_jax.modules.position import PositionBias
from hylorada_jax.modules.structure import StructureEncoder, TemporalStructureEncoder

POSITIONS = np.array([[0, 5, 40, 9000], [3, 4, 0, 1]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(seed=0, rank=2, d_in=5, d_out=3):
    """(v1 leaves, x, base_output, base_weight), float64 numpy, far from the initial values."""
    rng = np.random.default_rng(seed)
    leaves = {
        "lora_A": rng.normal(size=(rank, d_in)),
        "lora_B": rng.normal(size=(d_out, rank)),
        "magnitude": rng.uniform(1, 2, d_out),
        "magnitude_gate": rng.normal(),
        "residual_weight": rng.normal(),
    }
    shapes = ((2, 4, d_in), (2, 4, d_out), (d_out, d_in))
    return leaves, *(rng.normal(size=shape) for shape in shapes)


def formula(leaves, inputs, p, scale=8.0):
    """method.md §1 with B·A formed, p [batch, seq]."""
    x, base_output, weight = inputs
    update = scale * leaves["lora_B"] @ leaves["lora_A"]
    gate, beta = sigmoid(leaves["magnitude_gate"]), sigmoid(leaves["residual_weight"])
    magnitude = gate * leaves["magnitude"] + (1 - gate) * np.linalg.norm(weight, axis=1)
    column = (1 - beta) * magnitude / np.linalg.norm(weight + update, axis=1) + beta
    return (base_output + x @ update.T * p[..., None]) * column


def v2_case():
    leaves, *inputs = drawn()
    rng = np.random.default_rng(1)
    leaves["scale_from_structure"], prior = rng.normal(size=6), rng.normal(size=(2, 4, 6))
    p = 0.5 + sigmoid(prior @ leaves["scale_from_structure"])
    return HyLoRADAv2Linear(5, 3, rank=2, structure_dim=6), leaves, inputs, prior, p


def unified_case(positions=POSITIONS):
    leaves, *inputs = drawn()
    rng = np.random.default_rng(2)
    bias = rng.normal(size=64)
    leaves |= {"position_scale": rng.normal(), "position_bias": {"position_bias": bias}}
    where = np.tile(np.arange(4), (2, 1)) if positions is None else positions
    t = np.tanh(bias[np.vectorize(position_bucket)(where)])
    layer = HyLoRADAUnified(5, 3, rank=2, position_bias=PositionBias())
    return layer, leaves, inputs, positions, 1 + sigmoid(leaves["position_scale"]) * t


CASES = {"v2": v2_case, "unified": unified_case, "unified without": lambda: unified_case(None)}


@pytest.mark.parametrize("name", CASES)
def test_output_against_the_formula_and_gradients_against_differences(name):
    layer, leaves, inputs, condition, p = CASES[name]()
    with jax.enable_x64(True):
        params, inputs64 = jax.tree.map(jnp.asarray, (leaves, inputs))

        @jax.jit
        def run(params):
            return layer.apply({"params": params}, *inputs64, condition)

        # A few float64 roundings of terms of size 10.
        np.testing.assert_allclose(run(params), formula(leaves, inputs, p), rtol=0, atol=1e-12)
        check_grads(run, (params,), order=1, modes=["rev"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_neutral_conditions_are_v1_to_the_bit(dtype):
    leaves, *inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn())
    inputs = [value.astype(dtype) for value in inputs]
    prior = jnp.ones((2, 4, 32))
    v1 = HyLoRADALinear(5, 3, rank=2).apply({"params": leaves}, *inputs)
    scale = leaves | {"scale_from_structure": jnp.zeros(32)}
    live = leaves | {"scale_from_structure": jnp.ones(32)}
    bias = leaves | {"position_scale": jnp.ones(()), "position_bias": {"position_bias": jnp.zeros(64)}}
    v2 = HyLoRADAv2Linear(5, 3, rank=2)
    unified = HyLoRADAUnified(5, 3, rank=2, position_bias=PositionBias())
    assert v1.dtype == dtype
    assert jnp.array_equal(v2.apply({"params": live}, *inputs), v1)
    assert jnp.array_equal(v2.apply({"params": scale}, *inputs, prior), v1)
    assert jnp.array_equal(unified.apply({"params": bias}, *inputs, POSITIONS), v1)
    without = HyLoRADAUnified(5, 3, rank=2).apply(
        {"params": leaves | {"position_scale": jnp.ones(())}}, *inputs, POSITIONS
    )
    assert jnp.array_equal(without, v1)
    for layer in (LoRALinear(5, 3, rank=2), DoRALinear(5, 3, rank=2)):
        with pytest.raises(ConfigError, match="HyLoRADAv2Linear alone"):
            layer.init(jax.random.key(0), *inputs, prior)
    assert not jnp.array_equal(v2.apply({"params": live}, *inputs, prior), v1)


def test_fresh_layers_change_nothing_and_share_one_position_bias():
    class TwoLayers(nn.Module):
        @nn.compact
        def __call__(self, x, base_output, weight):
            shared = PositionBias()
            outputs = [
                HyLoRADAUnified(5, 3, rank=2, position_bias=shared)(x, base_output, weight) for _ in range(2)
            ]
            return (*outputs, HyLoRADAv2Linear(5, 3, rank=2)(x, base_output, weight, jnp.ones((2, 4, 32))))

    _, *inputs = drawn()
    inputs = [jnp.asarray(value, jnp.float32) for value in inputs]
    outputs, variables = TwoLayers().init_with_output(jax.random.key(0), *inputs)
    for output in outputs:
        # m₀/‖W‖ is 1 to rounding: ‖W‖ is a root of a sum, divided by itself.
        np.testing.assert_allclose(output, inputs[1], rtol=3e-7)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(variables["params"])]
    assert len([name for name in names if "'position_bias'" in name]) == 1
    assert len([name for name in names if "'position_scale'" in name]) == 2


@pytest.mark.parametrize("encoder", [StructureEncoder(8), TemporalStructureEncoder(8)])
def test_scale_and_encoder_both_leave_their_start(encoder):
    """Were the encoder's projection zero at the start as the scale is, neither would ever move."""
    layer, ids = HyLoRADAv2Linear(5, 3, rank=2, structure_dim=8), np.array([[0, 1, 2, 3]] * 2)
    _, x, base, weight = (jnp.asarray(value, jnp.float32) for value in (0, *drawn()[1:]))
    prior, encoded = encoder.init_with_output(jax.random.key(0), POSITIONS, ids)
    start = {"encoder": encoded, "layer": layer.init(jax.random.key(1), x, base, weight, prior)}

    @jax.jit
    def step(params):
        def loss(params):
            prior = encoder.apply(params["encoder"], POSITIONS, ids)
            return jnp.mean((layer.apply(params["layer"], x, base, weight, prior) - 2 * base) ** 2)

        return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, jax.grad(loss)(params))

    # B moves first, with it the scale, and with the scale the encoder.
    trained = step(step(step(start)))
    still = [
        jax.tree_util.keystr(path)
        for path, same in jax.tree.leaves_with_path(jax.tree.map(jnp.array_equal, start, trained))
        if same
    ]
    assert still == []


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, HyLoRADALinear, HyLoRADAv2Linear, HyLoRADAUnified])
def test_the_start_of_a_is_a_setting_and_the_sizes_are_checked(kind):
    x, weight = jnp.ones((1, 2, 5)), jnp.ones((3, 5))
    given = (jax.random.key(0), x, x @ weight.T, weight)

    def start(**settings):
        return kind(5, 3, rank=2, **settings).init(*given)["params"]["lora_A"]

    a = start(lora_A_init="orthogonal", lora_A_gain=3.0)
    np.testing.assert_allclose(a @ a.T, 9 * np.eye(2), atol=9e-6)  # float32
    kaiming = start(lora_A_init="kaiming", lora_A_gain=3.0)
    assert 0.5 * 3 / 5**0.5 < jnp.abs(kaiming).max() <= 3 / 5**0.5
    for wrong in (
        {"lora_A_init": "orthogonl"},
        {"lora_A_gain": 0.0},
        {"lora_A_gain": np.inf},
        {"dropout": 1.0},
        {"alpha": np.nan},
        {"alpha": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            start(**wrong)
    with pytest.raises(ConfigError, match=r"whole numbers ≥ 1[\s\S]*received: 5, 3, 2\.0"):
        kind(5, 3, rank=2.0).init(*given)
    for sizes in ((3, 5), (5, 4), (0, 3)):
        with pytest.raises(ConfigError, match=f"{kind.__name__}.*(≥ 1|base_weight)"):
            kind(*sizes, rank=2).init(*given)


def test_bad_input_is_refused():
    x, weight = jnp.ones((1, 2, 3)), jnp.ones((4, 3))
    base, key = x @ weight.T, jax.random.key(0)
    dora = DoRALinear(3, 4, rank=2)
    with pytest.raises(ConfigError, match=r"DoRALinear\(3, 4\): base_weight is \[4, 3\]"):
        dora.apply(dora.init(key, x, base, weight), weight[:3], method="init_magnitude", mutable="params")
    with pytest.raises(ConfigError, match="HyLoRADAv2Linear"):
        HyLoRADALinear(3, 4, rank=2).init(key, x, base, weight, jnp.ones((1, 2, 32)))
    with pytest.raises(DataError, match=r"\(1, 2, 31\)"):
        HyLoRADAv2Linear(3, 4, rank=2).init(key, x, base, weight, jnp.ones((1, 2, 31)))
    for positions in ([[0, -1]], [[0, 1, 2]], [[0.5, 1.0]]):
        with pytest.raises(DataError, match="integers ≥ 0"):
            HyLoRADAUnified(3, 4, rank=2, position_bias=PositionBias()).init(key, x, base, weight, positions)
