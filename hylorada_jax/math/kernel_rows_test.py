import os
import subprocess
import sys

ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hylorada_jax.math.kernel_rows import in_shards

shapes = []

def run(rows, ids, shared):
    shapes.append(rows.shape)
    return rows * shared + (0 if ids is None else ids)

mesh = Mesh(np.array(jax.devices()), ("data",))
rows = jnp.arange(8.0 * 3).reshape(8, 3)
for count, on_each in ((8, 2), (3, 3)):
    some, ids = rows[:count], jnp.arange(count)[:, None] if count == 8 else None
    loss = lambda rows, shared: (in_shards(run, rows, ids, shared=(shared,)) ** 2).sum()
    alone = jax.value_and_grad(loss, (0, 1))(some, jnp.ones(3))
    assert shapes[-1] == (count, 3)
    with jax.set_mesh(mesh):
        divided = jax.jit(jax.value_and_grad(loss, (0, 1)))(some, jnp.ones(3))
    assert shapes[-1] == (on_each, 3)
    jax.tree.map(np.testing.assert_array_equal, divided, alone)
"""


def test_devices_run_on_their_own_rows():
    """With the gradient of what they share; three rows, which four devices cannot divide, on each of them."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ON_FOUR_DEVICES], env=os.environ | flags, check=True, timeout=120)
