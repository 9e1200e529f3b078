"""Oracles: the functions that make the leaves and resolve them."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from hylorada_jax.leaves import KINDS, LEAVES, PARTS, Component, Group, Kind, Part, leaf_of
from hylorada_jax.math import linear_adapter, sparse, structure
from hylorada_jax.training.optimizer import GROUPS

RANK, D_IN, D_OUT = 2, 3, 5


def names(component):
    return {leaf.name for leaf in LEAVES if leaf.component == component}


def test_the_table_has_the_leaves_that_are_made_and_no_others():
    assert names("linear") == {leaf for kind in KINDS for leaf in KINDS[kind]}
    assert names("structure_encoder") == {
        *structure.leaf_shapes(4, "default"),
        *structure.leaf_shapes(4, "temporal"),
    }
    assert names("sparse") == {*sparse.leaf_shapes(2, 3)}
    # Below the top of the tree a name tells its component.
    below = [leaf.name for leaf in LEAVES if leaf.component not in ("position_bias", "structure_encoder")]
    assert len(below) == len(set(below))


def test_everything_that_a_type_lists_has_its_row():
    assert {leaf.component for leaf in LEAVES} == set(get_args(Component))
    assert {leaf.group for leaf in LEAVES} == set(get_args(Group)) == set(GROUPS)
    assert {leaf.part for leaf in LEAVES} - {None} == set(get_args(Part)) == set(PARTS)
    assert set(KINDS) == set(get_args(Kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_adapters_rows_say_what_its_leaves_are(kind):
    shapes = linear_adapter.leaf_shapes(kind, RANK, D_IN, D_OUT, structure_dim=7)
    for name, shape in shapes.items():
        row = leaf_of("linear", name)
        assert row.by_row == (D_OUT in shape and shape[0] == D_OUT)
        assert row.rank_axis == (shape.index(RANK) if RANK in shape else None)

    W = jnp.ones((D_OUT, D_IN))
    squared = jnp.sum(W * W, axis=1)
    leaves = linear_adapter.init_leaves(kind, jax.random.key(0), RANK, D_IN, squared, structure_dim=7)
    resolved = linear_adapter.resolve_leaves(leaves, W, squared, 1.0, detach_norm=False)
    assert set(resolved) == {leaf_of("linear", name).resolved for name in KINDS[kind]} - {None}
    # A fresh adapter does nothing, and so does one whose row-wise leaves are idle.
    assert jnp.all(resolved["scaled_B"] == leaf_of("linear", "lora_B").idle)
    if "column_scale" in resolved:
        assert jnp.all(resolved["column_scale"] == leaf_of("linear", "magnitude").idle)
