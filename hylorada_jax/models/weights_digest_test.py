"""On disk and loaded: parity_tests/test_files.py, for every family."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.models import weights_digest
from hylorada_jax.models.weights_digest import copies_of, tree_digest
from hylorada_jax.placement.placement import Placement, parse_mesh
from hylorada_jax.placement.processes import join
from hylorada_jax.placement.processes_test import measured_by_two


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


def layers(number=0):
    """Kernels of five layers, which devices share, and a norm that each has."""
    rng = np.random.default_rng(number)
    names = ("q_proj", "o_proj", "down_proj")
    kernels = {name: {"kernel": rng.normal(size=(5, 8, 4)).astype(np.float32)} for name in names}
    return kernels | {"norm": {"scale": rng.normal(size=4).astype(np.float32)}}


def measure(port, number):
    """What a process makes of trees that it holds alone or with the other, as JSON; called in each of two."""
    join(f"localhost:{port}", 2, int(number), timeout=60)
    weights_digest._PIECE_BYTES = 300  # two layers and a bit more: three pieces of every kernel
    hashed, of_leaf = [], weights_digest._of_leaf

    def counting(shape, dtype, pieces):
        pieces = [*pieces]
        hashed.append([len(shape), len(pieces)])
        return of_leaf(shape, dtype, pieces)

    weights_digest._of_leaf = counting

    def digest(tree):
        hashed.clear()
        return [tree_digest(tree), sorted(hashed)]

    def on(mesh, tree):
        return Placement(parse_mesh(mesh)).put(tree)

    trees = {mesh: on(mesh, layers()) for mesh in ("fsdp=4", "fsdp=2,tensor=2", "fsdp=2", "data=4")}
    own = layers(int(number))
    trees |= {"own": own, "own, fsdp=2": on("fsdp=2", own), "own, data=4": on("data=4", own)}
    found = {name: digest(tree) for name, tree in trees.items()}
    print(json.dumps(found), file=sys.stderr, flush=True)


@pytest.fixture(scope="module")
def found(on_devices):
    """Of two processes of two devices each: {mesh: [digest, [axes and pieces of each leaf hashed]]}."""
    measured, said, codes = measured_by_two(__name__, on_devices)
    assert codes == [0, 0], said
    return measured


def test_processes_that_hold_a_model_between_them_hash_each_its_share(found):
    """The three kernels in rounds of two; the last one's digest is both's. A norm lies with each."""
    for mesh in ("fsdp=4", "fsdp=2,tensor=2"):
        for process in found:
            assert process[mesh][0] == tree_digest(layers())
            assert process[mesh][1] == [[1, 1], [3, 3], [3, 3]]


def test_a_process_hashes_its_own_copy_which_may_be_another(found):
    for number, process in enumerate(found):
        for mesh in ("fsdp=2", "data=4"):
            assert process[mesh][0] == tree_digest(layers())
            assert len(process[mesh][1]) == 4
        for own in ("own", "own, fsdp=2", "own, data=4"):
            assert process[own][0] == tree_digest(layers(number))


@pytest.mark.parametrize(
    ("parts", "copies"),
    [
        ("a b c", [(0, 1, 2)]),
        ("ab ab", [(0,), (1,)]),
        ("a a b b", [(0, 2), (1, 3)]),
        ("a b a b", [(0, 1), (2, 3)]),
        ("a b b", [(0, 1), (0, 2)]),  # which no mesh of ours makes
    ],
)
def test_a_copy_is_with_those_who_hold_all_its_parts(parts, copies):
    assert [*copies_of([frozenset(held) for held in parts.split()])] == copies
