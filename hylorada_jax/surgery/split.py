"""Moving leaves between the frozen and the trainable tree."""

from collections.abc import Collection, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from hylorada_jax.surgery.plan import Site
from hylorada_jax.trees import Tree, TreePath


def unfrozen_paths(sites: Sequence[Site]) -> list[TreePath]:
    """The paths of the leaves that move from the frozen to the trainable tree."""
    return [(*s.module.path, leaf) for s in sites if s.component == "unfrozen" for leaf in s.leaves]


def split(tree: Tree, paths: Collection[TreePath]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tree without some leaves, and a tree of these leaves alone; :func:`join` is the inverse.

    Args:
        tree: nested mappings.
        paths: of the leaves to take out; each is in the tree.

    Returns:
        (what stays, what was taken); leaves are shared, nodes that end up empty are left out.

    Raises:
        KeyError: a path is not in the tree.

    Example:
        >>> split({"a": {"b": 1, "c": 2}}, [("a", "c")])
        ({'a': {'b': 1}}, {'a': {'c': 2}})
    """
    stays = flatten_dict(tree, keep_empty_nodes=True)
    taken = {path: stays.pop(path) for path in paths}
    return unflatten_dict(stays), unflatten_dict(taken)


def join(one: Tree, other: Tree) -> dict[str, Any]:
    """The tree with the leaves of both; where both have a leaf, that of the second.

    Args:
        one: nested mappings.
        other: nested mappings.

    Returns:
        A new tree that shares their leaves.

    Example:
        >>> join({"a": {"b": 1}}, {"a": {"c": 2}})
        {'a': {'b': 1, 'c': 2}}
    """
    return unflatten_dict(flatten_dict(one, keep_empty_nodes=True) | flatten_dict(other))
