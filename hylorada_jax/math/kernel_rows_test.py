ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hylorada_jax.math.kernel_rows import in_shards

shapes = []

def run(query, key, ids, by_head, shared):
    shapes.append((query.shape, key.shape))
    heads = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
    return query * heads * by_head[:, None] * shared + (0 if ids is None else ids[:, None])

query, key = (jnp.arange(8.0 * heads * 3).reshape(8, heads, 3) for heads in (8, 2))
# Rows and heads on each device; three rows, which the devices do not divide, are on each of them.
for sizes, count, on_each in (
    ((4, 1), 8, ((2, 8, 3), (2, 2, 3))),
    ((4, 1), 3, ((3, 8, 3), (3, 2, 3))),
    ((2, 2), 8, ((4, 4, 3), (4, 1, 3))),
    ((1, 4), 8, ((8, 2, 3), (8, 1, 3))),
):
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("data", "tensor"))
    ids = jnp.arange(count)[:, None] if count == 8 else None
    def loss(heads, by_head, shared):
        return (in_shards(run, heads, ids, by_head=(by_head,), shared=(shared,)) ** 2).sum()
    given = (query[:count], key[:count]), jnp.arange(8.0), jnp.float32(2)
    alone = jax.value_and_grad(loss, (0, 1, 2))(*given)
    assert shapes[-1] == ((count, 8, 3), (count, 2, 3))
    with jax.set_mesh(mesh):
        divided = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*given)
    assert shapes[-1] == on_each
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), divided, alone)
"""


def test_devices_run_on_their_own_rows_and_heads(run_on_devices):
    """With the gradients of what they share, also where there are fewer key-value heads than devices."""
    run_on_devices(4, ON_FOUR_DEVICES)
