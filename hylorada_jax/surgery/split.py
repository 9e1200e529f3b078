"""Moving leaves between the frozen and the trainable tree."""

from collections.abc import Collection, Sequence
from typing import Any

from hylorada_jax.surgery.modules import Path
from hylorada_jax.surgery.plan import Site
from hylorada_jax.trees import Tree


def unfrozen_paths(sites: Sequence[Site]) -> list[Path]:
    """The paths of the leaves that move from the frozen to the trainable tree."""
    return [(*s.module.path, leaf) for s in sites if s.component == "unfrozen" for leaf in s.leaves]


def split(tree: Tree, paths: Collection[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
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
    stays, taken = dict(tree), {}
    for key in {path[0] for path in paths}:
        below = [path[1:] for path in paths if path[0] == key]
        if () in below:
            taken[key] = stays.pop(key)
            continue
        rest, taken[key] = split(tree[key], below)
        if rest:
            stays[key] = rest
        else:
            del stays[key]
    return stays, taken


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
    joined = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and key in joined
        joined[key] = join(joined[key], value) if both else value
    return joined
