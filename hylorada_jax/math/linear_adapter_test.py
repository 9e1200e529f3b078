import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math import linear_adapter


@pytest.mark.parametrize("kind", linear_adapter.LEAVES)
def test_fresh_leaves_have_the_stated_shapes(kind):
    leaves = linear_adapter.init_leaves(kind, jax.random.key(0), 2, 5, jnp.ones(3), structure_dim=7)
    shapes = linear_adapter.leaf_shapes(kind, 2, 5, 3, structure_dim=7)
    assert {name: leaf.shape for name, leaf in leaves.items()} == shapes


@pytest.mark.parametrize("kind", linear_adapter.LEAVES)
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
