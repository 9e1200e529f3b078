"""In shard_map and on explicit meshes a layer has the gradients that it has on one device."""

ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from hylorada_jax.math.linear_adapter import adapted_layer, init_leaves
from hylorada_jax.math.low_rank import row_norm_squared

jax.config.update("jax_enable_x64", True)
draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, "float64")
x, weight = draw(0, 4, 3, 4), draw(1, 6, 4)

def close(ours, theirs):
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-11, atol=1e-11), ours, theirs)

for method in ("lora", "dora", "hylorada_v1"):
    leaves = init_leaves(method, jax.random.key(2), 2, 4, row_norm_squared(weight))
    leaves = jax.tree.map(lambda a: a + 0.1 * draw(3, *a.shape), leaves)
    def loss(leaves, x, weight, **kwargs):
        base = jnp.einsum("...i,oi->...o", x, weight, **kwargs)
        return jnp.sum(adapted_layer(leaves, x, base, weight, 2.0) ** 2)
    expected = jax.grad(loss)(leaves, x, weight)

    shards = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(jax.grad(loss), mesh=shards, in_specs=(P(), P("data"), P()), out_specs=P())
    close(jax.jit(mapped)(leaves, x, weight), expected)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        # Of the layers of an MLP the first has its outputs sharded, the second its inputs.
        for rows, columns in (("model", None), (None, "model")):
            placed = [jax.device_put(a, NamedSharding(mesh, P(*spec)))
                      for a, spec in ((x, ("data", None, columns)), (weight, (rows, columns)))]
            of_output = {"out_sharding": P("data", None, rows)}
            gradient = jax.jit(lambda *given: jax.grad(lambda *all: loss(*all, **of_output))(*given))
            close(gradient(leaves, *placed), expected)
print("done")
"""


def test_gradients_of_what_all_shards_share_are_summed(run_on_devices):
    assert run_on_devices(4, ON_FOUR_DEVICES) == "done\n"
