from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.errors import ConfigError
from hylorada_jax.modules import linear as linen
from hylorada_jax.nnx import AdapterParam, HyLoRADALinear, LoRALinear


def test_a_structure_prior_where_none_is_read_is_refused():
    x, prior = jnp.ones((1, 2, 3)), jnp.ones((1, 2, 32))
    layer: Any = LoRALinear(3, 4, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="deterministic"):
        layer(x, x @ jnp.ones((3, 4)), jnp.ones((4, 3)), prior)


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
