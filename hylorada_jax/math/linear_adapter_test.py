import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.leaves import KINDS
from hylorada_jax.math import linear_adapter


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_leaves_have_the_stated_shapes(kind):
    leaves = linear_adapter.init_leaves(kind, jax.random.key(0), 2, 5, jnp.ones(3), structure_dim=7)
    shapes = linear_adapter.leaf_shapes(kind, 2, 5, 3, structure_dim=7)
    assert {name: leaf.shape for name, leaf in leaves.items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_of_a(kind):
    def start(rank, **settings):
        leaves = linear_adapter.init_leaves(kind, jax.random.key(0), rank, 50, jnp.ones(6), **settings)
        return leaves["lora_A"]

    a = start(8, lora_A_init="orthogonal", lora_A_gain=3.0)
    # Float32: a QR decomposition of 8 rows.
    np.testing.assert_allclose(a @ a.T, 9 * np.eye(8), atol=9e-6)
    a = start(60, lora_A_init="orthogonal", lora_A_gain=0.5)
    np.testing.assert_allclose(a.T @ a, 0.25 * np.eye(50), atol=1e-6)
    # 400 draws of a uniform distribution on ±3/√50 come within 2 % of the bound.
    kaiming = start(8, lora_A_init="kaiming", lora_A_gain=3.0)
    assert 0.98 * 3 / math.sqrt(50) < float(jnp.abs(kaiming).max()) <= 3 / math.sqrt(50)
    default = "kaiming" if kind in ("lora", "dora") else "orthogonal"
    np.testing.assert_array_equal(start(8), start(8, lora_A_init=default))


@pytest.mark.parametrize(
    ("kind", "width", "count"),
    [
        ("hylorada_v1", 768, 13_058),
        ("hylorada_v2", 768, 13_090),
        ("hylorada", 768, 13_059),
        ("hylorada_v1", 896, 15_234),
    ],
)
def test_counts_of_one_square_layer(kind, width, count):
    """The table of method.md §8."""
    assert (
        sum(math.prod(shape) for shape in linear_adapter.leaf_shapes(kind, 8, width, width).values()) == count
    )


def test_v2_and_unified_resolve_to_v1_and_their_condition():
    weight = jax.random.normal(jax.random.key(1), (3, 5))
    norms = jnp.sum(weight**2, axis=1)

    def resolve(kind, **changed):
        leaves = linear_adapter.init_leaves(kind, jax.random.key(0), 2, 5, norms) | changed
        return linear_adapter.resolve_leaves(leaves, weight, norms, 2.0, detach_norm=False)

    v1 = resolve("hylorada_v1")
    scale = jnp.arange(32.0)
    for condition, resolved in (
        ({"scale_from_structure": scale}, resolve("hylorada_v2", scale_from_structure=scale)),
        # σ(ln 3) = 3/4
        ({"position_gate": jnp.array(0.75)}, resolve("hylorada", position_scale=jnp.log(3.0))),
    ):
        assert set(resolved) == set(v1) | set(condition)
        for name, leaf in (v1 | condition).items():
            assert jnp.allclose(resolved[name], leaf, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("residual", [-80.0, 0.1, 10.0, 17.0, 30.0, 80.0])
@pytest.mark.parametrize("gate", [-80.0, 0.0, 17.0])
def test_a_dora_layer_keeps_its_scale_at_any_gates(gate, residual):
    """Beyond 17, 1 − σ(x) is 0 in float32, and σ(−x) is not."""
    rng = np.random.default_rng(0)
    weight, lora_A, lora_B = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (2, 5), (6, 2)))
    facts = weight, jnp.sum(weight**2, axis=1), 2.0
    # To spread between gates: as far from n as a trained magnitude is.
    dora = {"lora_A": lora_A, "lora_B": lora_B, "magnitude": jnp.asarray(rng.uniform(1, 9, 6), jnp.float32)}
    v1 = linear_adapter.from_dora(dora, *facts, gate_init=gate, residual_init=residual)
    if residual - gate > 88:  # e⁸⁸ is the end of float32: `expand` refuses such gates
        assert not np.all(np.isfinite(v1["magnitude"]))
        return
    expected = linear_adapter.resolve_leaves(dora, *facts, detach_norm=True)["column_scale"]
    got = linear_adapter.resolve_leaves(v1, *facts, detach_norm=False)["column_scale"]
    # A few roundings of float32, of sums whose terms are n, m₀ and m.
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6)
    np.testing.assert_allclose(linear_adapter.to_dora(v1, *facts)["magnitude"], dora["magnitude"], atol=4e-5)
