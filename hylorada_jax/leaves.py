"""The trainable leaves of an adapter: one row each, and every table of leaves is derived from these.

Imports neither jax nor flax. The PyTorch reference keeps a table of its own, as the oracle of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, assert_never

Kind = Literal["lora", "dora", "hylorada_v1", "hylorada_v2", "hylorada"]
Component = Literal["linear", "position_bias", "structure_encoder", "daa", "sparse", "unfrozen"]
Part = Literal["position_bias", "structure", "daa", "sparse"]
Group = Literal[
    "lora_A", "lora_B", "magnitude", "gate", "daa", "sparse", "sparse_gate", "unfrozen", "unfrozen_norm"
]

# What serves the whole model lies at the top of the tree: a leaf, and a node.
POSITION_BIAS: Component = "position_bias"
STRUCTURE_ENCODER: Component = "structure_encoder"

PARTS: dict[Part, str] = {
    "position_bias": "the position bias",
    "structure": "the structure prior",
    "daa": "direct attention adaptation",
    "sparse": "the sparse adapter",
}
"""What an adapter can do that no weights can express, in words."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """What is known of one trainable leaf.

    Attributes:
        component: the component that it belongs to.
        name: in the trainable tree, and in method.md.
        group: the parameter group that it learns in.
        rank_axis: the axis that counts the rank; a stacked tree pads it to its largest layer's.
        by_row: it has an entry for each row of W.
        cut: the axis, not counting the layers, that devices which share the weights share too; None: each has
            the whole leaf, but for a table of tokens, which lies as the base's does.
        part: the part that has no effect exactly where the leaf is ``neutral`` everywhere.
        neutral: that value.
        resolved: the leaf of the resolved tree that is made from it; None where another leaf's takes it in.
        idle: what this is where a layer, or a row of a batch, has no adapter.
        in_file: its name in an adapter's file, as in torch.
        peft: PEFT's name, where PEFT has it.
    """

    component: Component
    name: str
    group: Group
    rank_axis: int | None = None
    by_row: bool = False
    cut: Literal[0, 1] | None = None
    part: Part | None = None
    neutral: float = 0
    resolved: str | None
    idle: float = 0
    in_file: str
    peft: str | None = None


def _leaf(component: Component, name: str, group: Group, **facts: Any) -> Leaf:
    """A leaf that is in the resolved tree and in files under its own name, where nothing else is said."""
    own = {"resolved": name, "in_file": name}
    return Leaf(component=component, name=name, group=group, **(own | facts))


LEAVES = (
    _leaf("linear", "lora_A", "lora_A", rank_axis=0, cut=1, peft="lora_A.weight"),
    _leaf(
        "linear", "lora_B", "lora_B",
        rank_axis=1, by_row=True, cut=0, resolved="scaled_B", peft="lora_B.weight",
    ),
    # It was a parameter of PEFT's once, and has kept that name in files.
    _leaf(
        "linear", "magnitude", "magnitude",
        by_row=True, resolved="column_scale", idle=1, peft="lora_magnitude_vector",
    ),
    _leaf("linear", "magnitude_gate", "gate", resolved=None),
    _leaf("linear", "residual_weight", "gate", resolved=None),
    _leaf("linear", "position_scale", "gate", resolved="position_gate"),
    _leaf("linear", "scale_from_structure", "gate", part="structure"),
    _leaf("position_bias", "position_bias", "gate", part="position_bias"),
    # Where nothing is adapted its prior meets B = 0, but must be finite: it is divided by the periods.
    *(
        _leaf("structure_encoder", name, "gate", idle=1)
        for name in (
            "bucket_embeddings", "structure_embeddings", "freq_scale", "norm_weight", "norm_bias",
            "proj_weight", "gate", "periods", "period_weight",
        )
    ),
    _leaf("daa", "alpha", "daa", part="daa", neutral=1, idle=1),
    _leaf("daa", "beta", "daa"),  # inert: constant along each row of the softmax
    _leaf("daa", "position_bias", "daa", part="daa"),
    _leaf("sparse", "down", "sparse", cut=1),
    _leaf("sparse", "up", "sparse", cut=0, part="sparse"),
    _leaf("sparse", "gate_scores", "sparse_gate", resolved="mask"),
    # Embeddings and norms of the base, under Flax's names; torch calls an embedding's and a norm's "weight".
    _leaf("unfrozen", "embedding", "unfrozen", in_file="weight"),
    _leaf("unfrozen", "scale", "unfrozen_norm", in_file="weight"),
    _leaf("unfrozen", "bias", "unfrozen_norm"),
    _leaf("unfrozen", "weight", "unfrozen_norm"),  # T5's
)  # fmt: skip

_V1 = ("lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight")

KINDS: dict[Kind, tuple[str, ...]] = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "magnitude"),
    "hylorada_v1": _V1,
    "hylorada_v2": (*_V1, "scale_from_structure"),
    "hylorada": (*_V1, "position_scale"),
}
"""The leaves of each kind of linear adapter."""

_BY_KEY = {(leaf.component, leaf.name): leaf for leaf in LEAVES}
_AT_THE_TOP: dict[str, dict[str, Leaf]] = {
    component: {leaf.name: leaf for leaf in LEAVES if leaf.component == component}
    for component in (POSITION_BIAS, STRUCTURE_ENCODER)
}
# Below, a leaf's name is enough: no two components share one.
_BELOW = [leaf for leaf in LEAVES if leaf.component not in _AT_THE_TOP]
_BY_NAME = {leaf.name: leaf for leaf in _BELOW}
_BY_RESOLVED = {leaf.resolved: leaf for leaf in _BELOW if leaf.resolved}


def lora_a_start(kind: Kind | None, init: str | None) -> str:
    """How lora_A starts: as asked for, else orthogonal, but as Kaiming has it for lora and dora.

    Example:
        >>> lora_a_start("dora", None), lora_a_start("dora", "orthogonal"), lora_a_start("hylorada", None)
        ('kaiming', 'orthogonal', 'orthogonal')
    """
    return init or ("orthogonal" if kind in ("hylorada_v1", "hylorada_v2", "hylorada") else "kaiming")


def leaf_of(component: Component, name: str) -> Leaf:
    """The row of a component's leaf.

    Example:
        >>> leaf_of("daa", "alpha").neutral, leaf_of("linear", "lora_B").rank_axis
        (1, 1)
    """
    return _BY_KEY[component, name]


def leaf_at(path: tuple[str, ...], *, resolved: bool = False) -> Leaf | None:
    """The row of the leaf at a path of the trainable tree, or of the resolved one; None where there is none.

    Args:
        path: from the tree's top, where the position bias and the structure encoder lie.
        resolved: of the resolved tree.

    Example:
        >>> leaf_at(("position_bias",)).group, leaf_at(("h", "0", "attn", "position_bias")).group
        ('gate', 'daa')
        >>> leaf_at(("q_proj", "column_scale"), resolved=True).name
        'magnitude'
    """
    below = _BY_RESOLVED if resolved else _BY_NAME
    return _AT_THE_TOP.get(path[0], below).get(path[-1])


def collapsed_kind(kind: Kind) -> Literal["lora", "dora"]:
    """What a trained linear adapter is where its update is the same for every token.

    Source: method.md §1, Collapse.
    """
    match kind:
        case "lora":
            return "lora"
        case "dora" | "hylorada_v1" | "hylorada_v2" | "hylorada":
            return "dora"
        case _:
            assert_never(kind)
