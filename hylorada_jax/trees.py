"""The trees of an adapted model: nested dicts of arrays, whose paths are those of the base's parameters.

To a type checker they are all dicts: the names say which of them a signature expects.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

COLLECTION = "hylorada"
"""The Flax collection beside ``params`` in which a module finds its slice of the resolved tree."""

Tree: TypeAlias = Mapping[str, Any]
"""A nested mapping of any kind, or one node of a tree."""

TreePath: TypeAlias = tuple[str, ...]
"""The keys that lead to a leaf or a node."""

Params: TypeAlias = dict[str, Any]
"""The base's parameters: W, biases, embeddings, norms."""

Adapters: TypeAlias = dict[str, Any]
"""The leaves that train, those of :mod:`hylorada_jax.leaves`: lora_A, lora_B (without s), magnitude, …"""

Constants: TypeAlias = dict[str, Any]
"""What the base's weights and the config determine: ‖W‖² and s of each adapted layer, the dropout rate."""

Frozen: TypeAlias = dict[str, Any]
"""All that does not train: {"params": Params without the leaves that train, "constants": Constants}."""

Resolved: TypeAlias = dict[str, Any]
"""What the forward pass reads, a function of weights alone: lora_A, scaled_B = s·B, column_scale = c, …"""


def by_name(tree: Tree) -> dict[str, Any]:
    """A tree's leaves by their paths, as "model.layers.mlp.up_proj.lora_A"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def is_traced(tree: Any) -> bool:
    """Whether some leaf of a tree has no value yet, for a function that reads it is being compiled."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is one of qwix's arrays."""
    return hasattr(leaf, "qvalue")
