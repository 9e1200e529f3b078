"""Oracle of the sharded loss: the loss on one device."""

import pytest

# Rows of 12 tokens on eight devices, and their loss with its gradients.
PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from hylorada_jax.placement.placement import Placement, parse_mesh
from hylorada_jax.placement.shards import in_use, shard_rows
from hylorada_jax.models.scoring import score

rng = np.random.default_rng(0)
hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float64) for s in ((ROWS, 12, 6), (40, 6)))
targets = jnp.where(rng.random((ROWS, 12)) < 0.3, rng.integers(0, 40, (ROWS, 12)), -1)

@jax.jit
def of(hidden, head, targets):
    nll, pull = jax.vjp(lambda h, w: score(h, w, targets), hidden, head)
    return nll, *pull(nll)

alone = of(hidden, head, targets)
head = Placement(parse_mesh()).put(head)
with in_use(head):
    given = shard_rows(hidden), head, shard_rows(targets)
    ours = of(*given)
    program = of.lower(*given).compile().as_text()
for one, many in zip(alone, ours, strict=True):
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-12)
assert {len(x.sharding.device_set) for x in ours} == {8}
print(*set(re.findall("all-[a-z]+|collective-[a-z]+|reduce-scatter", program)))
"""


@pytest.mark.parametrize("rows", [8, 16])
def test_no_token_of_rows_on_eight_devices_goes_to_another(rows, run_on_devices):
    printed = run_on_devices(8, f"ROWS = {rows}{PROGRAM}", JAX_ENABLE_X64="1")
    # The head's gradient is a sum over all rows, and the largest number of turns is known to all.
    assert printed.split() == ["all-reduce"]
