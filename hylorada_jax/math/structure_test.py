import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hylorada_jax.math import structure
from hylorada_jax.math.position_test import structure_bucket
from hylorada_jax.math.sparse_test import rank_correlation


def drawn(encoder_type, seed=0):
    """Leaves far from the initial values, float64 numpy; small periods, so that differences resolve them."""
    rng = np.random.default_rng(seed)
    sizes = {"encoding_dim": 6, "max_structure_types": 5}
    shapes = structure.leaf_shapes(4, encoder_type, **sizes)
    leaves = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if encoder_type == "temporal":
        leaves["periods"] = -rng.uniform(5, 30, 4)
    return leaves


def slow_prior(leaves, positions, structure_ids, seq_len):
    """method.md §5, token by token."""
    depth = leaves["norm_weight"].size
    prior = np.empty((*positions.shape, len(leaves["proj_weight"])))
    for place in np.ndindex(*positions.shape):
        p = positions[place]
        e = leaves["bucket_embeddings"][structure_bucket(int(np.floor(p)) - seq_len // 2)].copy()
        i = np.arange(depth // 2)
        theta = p * np.abs(leaves["freq_scale"]) * 10000.0 ** (-i / (depth / 2))
        e += np.concatenate([np.sin(theta), np.cos(theta)])
        if structure_ids is not None:
            top = leaves["structure_embeddings"].shape[0] - 1
            e += leaves["structure_embeddings"][min(max(structure_ids[place], 0), top)]
        if "periods" in leaves:
            phi = 2 * np.pi * p / np.abs(leaves["periods"])
            e += leaves["period_weight"] @ np.concatenate([np.sin(phi), np.cos(phi)])
        e = (e - e.mean()) / np.sqrt(e.var() + 1e-5) * leaves["norm_weight"] + leaves["norm_bias"]
        prior[place] = leaves["proj_weight"] @ e / (1 + np.exp(-leaves["gate"]))
    return prior


@pytest.mark.parametrize("encoder_type", ["default", "temporal"])
@pytest.mark.parametrize("ids", [None, np.array([[0, 4, 9, -3]])])
@pytest.mark.parametrize("positions", [np.array([[0, 3, 50, 700]]), np.array([[0.0, 7.75, 8.0, 8.999]])])
def test_prior_against_the_formula(encoder_type, ids, positions):
    leaves = drawn(encoder_type)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, (leaves, positions, ids))
        found = structure.structure_prior(*given, 17)  # type: ignore[call-arg]
        # Angles up to 700 radians: 700 · 2^-53 is 1e-13; LayerNorm divides by about 1.
        np.testing.assert_allclose(found, slow_prior(leaves, positions, ids, 17), rtol=0, atol=1e-11)


@pytest.mark.parametrize("encoder_type", ["default", "temporal"])
def test_gradient_against_differences(encoder_type):
    leaves = drawn(encoder_type, 1)
    with jax.enable_x64(True):
        positions, ids = jnp.array([[0.0, 3.25, 9.5]]), jnp.array([[0, 1, 1]])
        check_grads(
            jax.jit(lambda given: structure.structure_prior(given, positions, ids, 8)),
            (jax.tree.map(jnp.asarray, leaves),),
            order=1,
            modes=["rev"],
        )


def test_a_float_just_below_a_whole_number_is_in_the_bucket_below():
    # 0.99999994 − 1024 is −1023 in float32: the floor must come first. −1024 begins a bucket.
    assert structure_bucket(-1024) != structure_bucket(-1023)
    leaves = structure.init_leaves(jax.random.key(0), 4) | {"freq_scale": jnp.zeros(16)}
    below = np.nextafter(np.float32(1), np.float32(0))
    prior = structure.structure_prior(leaves, jnp.array([[0.0, below, 1.0]]), None, 2048)
    assert jnp.array_equal(prior[:, 0], prior[:, 1])
    assert not jnp.array_equal(prior[:, 1], prior[:, 2])


def test_fresh_leaves():
    for encoder_type in ("default", "temporal"):
        leaves = structure.init_leaves(jax.random.key(0), 8, encoder_type)
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        assert shapes == structure.leaf_shapes(8, encoder_type)
        # 2048 draws or more: the sample deviation has a relative standard error of 1.6%; 7% is over four.
        for name in ("bucket_embeddings", "structure_embeddings"):
            assert float(leaves[name].std()) == pytest.approx(0.02, rel=0.07)
        # The largest of 256 uniform draws is near the bound.
        for name in {"proj_weight", "period_weight"} & {*leaves}:
            bound = leaves[name].shape[1] ** -0.5
            assert 0.9 * bound < float(jnp.abs(leaves[name]).max()) <= bound
        assert float(leaves["gate"]) == 0
        some = [leaf.ravel()[:64] for leaf in leaves.values()]
        assert rank_correlation(draws for draws in some if len(np.unique(draws)) > 4) < 0.6  # ± 0.13
    assert set(leaves) - set(structure.leaf_shapes(8)) == {"periods", "period_weight"}
