from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.errors import ConfigError
from hylorada_jax.modules import linear as linen
from hylorada_jax.nnx import AdapterParam, HyLoRADALinear, LoRALinear, SparseAdapter


def test_a_structure_prior_where_none_is_read_is_refused():
    x, prior = jnp.ones((1, 2, 3)), jnp.ones((1, 2, 32))
    layer: Any = LoRALinear(3, 4, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="deterministic"):
        layer(x, x @ jnp.ones((3, 4)), jnp.ones((4, 3)), prior)


@pytest.mark.parametrize("make", [partial(LoRALinear, 3, 4), partial(SparseAdapter, 4)])
def test_a_layer_asks_for_the_streams_that_it_draws_from(make):
    make(rngs=nnx.Rngs(params=0)).train()
    make(dropout=0.5, rngs=nnx.Rngs(params=0, dropout=1))
    with pytest.raises(ConfigError, match="without dropout"):
        make(dropout=0.5, rngs=nnx.Rngs(params=0))
    with pytest.raises(ConfigError, match="without params"):
        make(rngs=nnx.Rngs(dropout=0))


def test_a_layer_that_meets_its_weight_in_a_gradient_has_linens():
    kernel, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 5), (2, 3, 4)]))
    call = (x, x @ kernel, kernel.T)
    layer = HyLoRADALinear(4, 5, rank=2, rngs=nnx.Rngs(0))
    other = linen.HyLoRADALinear(4, 5, rank=2)
    params = jax.jit(other.init)(jax.random.key(0), *call)["params"] | {"lora_A": layer.lora_A[...]}
    expected = jax.jit(jax.grad(lambda params: jnp.sum(other.apply({"params": params}, *call) ** 2)))(params)
    wrt = nnx.DiffState(0, AdapterParam)
    found = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(*call) ** 2), argnums=wrt))(layer)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), nnx.to_pure_dict(found), dict(expected)
    )
    # Two programs.
    np.testing.assert_allclose(layer.magnitude[...], params["magnitude"], rtol=1e-6)
