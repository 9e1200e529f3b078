"""On disk and loaded: parity_tests/test_files.py, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.models import weights_digest
from hylorada_jax.models.weights_digest import tree_digest


def tree():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(7, 3, 2)).astype(np.float32)
    return {"fc": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(5, jnp.bfloat16)}, "scale": jnp.ones(())}


def test_every_bit_place_shape_and_dtype_counts():
    def flipped(leaf):
        raw = np.array(leaf)
        raw.reshape(-1).view(np.uint8)[-1] ^= 1
        return jnp.asarray(raw)

    whole = tree()
    leaves, structure = jax.tree.flatten(whole)
    others = [
        jax.tree.unflatten(structure, [*leaves[:i], flipped(leaf), *leaves[i + 1 :]])
        for i, leaf in enumerate(leaves)
    ]
    others += [
        {"fc": whole["fc"], "other": whole["scale"]},
        {**whole, "fc": {**whole["fc"], "kernel": whole["fc"]["kernel"].reshape(7, 2, 3)}},
        {**whole, "fc": {**whole["fc"], "bias": jnp.zeros(5, jnp.float16)}},
    ]
    assert len({tree_digest(other) for other in (whole, *others)}) == 1 + len(others)


@pytest.mark.parametrize("size", [1, 40, 72, 10**6])
def test_an_accelerators_leaves_are_read_in_pieces(monkeypatch, size):
    whole = tree_digest(tree())
    monkeypatch.setattr(weights_digest, "_lies_on_host", lambda leaf: False)
    monkeypatch.setattr(weights_digest, "_PIECE_BYTES", size)
    assert tree_digest(tree()) == whole
