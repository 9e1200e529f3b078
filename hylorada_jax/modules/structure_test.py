import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math import structure
from hylorada_jax.math.structure_test import drawn, slow_prior
from hylorada_jax.modules.structure import StructureEncoder, TemporalStructureEncoder

ENCODERS = {"default": StructureEncoder, "temporal": TemporalStructureEncoder}


@pytest.mark.parametrize("encoder_type", ENCODERS)
@pytest.mark.parametrize("seq_len", [None, 40])
def test_encoder_against_the_formula(encoder_type, seq_len):
    leaves, positions, ids = drawn(encoder_type), np.array([[0, 3, 50]]), np.array([[2, 0, 1]])
    encoder = ENCODERS[encoder_type](4, encoding_dim=6, max_structure_types=5)
    with jax.enable_x64(True):
        prior = encoder.apply({"params": jax.tree.map(jnp.asarray, leaves)}, positions, ids, seq_len)
        # Angles up to 50 radians in float64.
        np.testing.assert_allclose(
            prior, slow_prior(leaves, positions, ids, seq_len or 3), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_parameters(encoder_type):
    params = ENCODERS[encoder_type](32).init(jax.random.key(0), jnp.array([[0]]))["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == structure.leaf_shapes(32, encoder_type)
    assert {leaf.dtype.name for leaf in params.values()} == {"float32"}
    # method.md §5's count; the temporal encoder has 4 periods and their projection [32, 8] besides.
    assert sum(leaf.size for leaf in params.values()) == {"default": 7_281, "temporal": 7_541}[encoder_type]


def test_position_tensor():
    for encoder in ENCODERS.values():
        positions = encoder(32).get_position_tensor(2, 3)
        assert positions.dtype == jnp.int32
        assert positions.tolist() == [[0, 1, 2]] * 2


def test_bad_input_is_refused():
    key, positions = jax.random.key(0), jnp.array([[0, 1]])
    for ids in (jnp.array([[0, 1, 2]]), jnp.array([0, 1]), jnp.ones((1, 2))):
        with pytest.raises(DataError, match="structure_ids"):
            StructureEncoder(8).init(key, positions, ids)
    for wrong in (jnp.array([0, 1]), jnp.array([[0, -1]])):
        with pytest.raises(DataError, match="osition"):
            StructureEncoder(8).init(key, wrong)
    with pytest.raises(ConfigError, match="encoding_dim=5"):
        StructureEncoder(8, encoding_dim=5).init(key, positions)
    with pytest.raises(ConfigError, match="max_structure_types=0"):
        StructureEncoder(8, max_structure_types=0).init(key, positions)
    with pytest.raises(ConfigError, match="num_periods"):
        TemporalStructureEncoder(8, num_periods=5).init(key, positions)
