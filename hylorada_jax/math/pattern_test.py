from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from hylorada_jax.math.pattern import Pattern


def test_mask_equals_the_definition():
    rng = np.random.default_rng(3)
    valid, segments = rng.random((3, 9)) < 0.7, np.sort(rng.integers(1, 4, (3, 9)), axis=1)
    positions = jnp.zeros((3, 9), int)
    rows = Pattern.of_rows(positions, key_valid=jnp.asarray(valid), segment_ids=jnp.asarray(segments))
    mask, both_ways = replace(rows, window=3).mask(), replace(rows, causal=False).mask()
    for b, q, k in np.ndindex(3, 9, 9):
        seen = k <= q and q - k < 3 and valid[b, k] and segments[b, q] == segments[b, k]
        assert mask[b, 0, q, k] == seen
        assert both_ways[b, 0, q, k] == (valid[b, k] and segments[b, q] == segments[b, k])
