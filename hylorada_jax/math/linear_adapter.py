"""The linear adapters: the shapes of their leaves, how they start, and what they resolve to.

The Flax modules, the tree surgery and the parameter counts all read this file.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from hylorada_jax.leaves import KINDS, Kind, lora_a_start
from hylorada_jax.math import low_rank


def leaf_shapes(
    kind: Kind, rank: int, d_in: int, d_out: int, *, structure_dim: int = 32
) -> dict[str, tuple[int, ...]]:
    """The trainable leaves of one adapter, by name.

    Args:
        kind: a key of ``KINDS``.
        rank: r.
        d_in: input features.
        d_out: output features.
        structure_dim: width of the structure prior, for v2.

    Returns:
        {leaf name: shape}.

    Example:
        >>> leaf_shapes("dora", 2, 3, 4)
        {'lora_A': (2, 3), 'lora_B': (4, 2), 'magnitude': (4,)}

    Source: method.md §1.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A": (rank, d_in),
        "lora_B": (d_out, rank),
        "magnitude": (d_out,),
        "scale_from_structure": (structure_dim,),
    }
    return {name: shapes.get(name, ()) for name in KINDS[kind]}


def init_leaves(
    kind: Kind,
    key: Array,
    rank: int,
    d_in: int,
    norm_squared: Float[Array, " d_out"],
    *,
    lora_A_init: str | None = None,
    lora_A_gain: float = 1.0,
    gate_init: float = 0.0,
    residual_init: float = 0.1,
    structure_dim: int = 32,
) -> dict[str, Array]:
    """The leaves of a fresh adapter, under which the layer computes what it did before.

    Args:
        kind: a key of ``KINDS``.
        key: a PRNG key, used for lora_A.
        rank: r.
        d_in: input features.
        norm_squared: n₀² = ‖W‖² of every row.
        lora_A_init: "orthogonal" or "kaiming"; None: kaiming for lora and dora, else orthogonal.
        lora_A_gain: multiplies the initial lora_A.
        gate_init: magnitude_gate, before its sigmoid.
        residual_init: residual_weight, before its sigmoid.
        structure_dim: width of the structure prior, for v2.

    Returns:
        {leaf name: array} in norm_squared's dtype, float32 for a model of float32 or less.

    Example:
        >>> leaves = init_leaves("lora", jax.random.key(0), 2, 3, jnp.ones(4))
        >>> {name: leaf.shape for name, leaf in leaves.items()}
        {'lora_A': (2, 3), 'lora_B': (4, 2)}

    Source: method.md §1.
    """
    dtype = norm_squared.dtype
    orthogonal = lora_a_start(kind, lora_A_init) == "orthogonal"
    init_A = low_rank.orthogonal_init if orthogonal else low_rank.kaiming_init
    leaves = {
        "lora_A": (lora_A_gain * init_A(key, rank, d_in)).astype(dtype),
        "lora_B": jnp.zeros((norm_squared.shape[0], rank), dtype),
        "magnitude": low_rank.safe_sqrt(norm_squared),
        "magnitude_gate": jnp.asarray(gate_init, dtype),
        "residual_weight": jnp.asarray(residual_init, dtype),
        "scale_from_structure": jnp.zeros(structure_dim, dtype),
        "position_scale": jnp.zeros((), dtype),
    }
    return {name: leaves[name] for name in KINDS[kind]}


def resolve_leaves(
    leaves: Mapping[str, Array],
    weight: Float[Array, "d_out d_in"] | Partial,
    norm_squared: Float[Array, " d_out"],
    scale: float | Float[Array, ""],
    *,
    detach_norm: bool,
) -> dict[str, Array]:
    """All of an adapter that depends on weights only: A, s·B, the column scale c and what p needs.

    Args:
        leaves: the adapter's leaves; their names tell its kind.
        weight: W, or what gives it from arrays.
        norm_squared: n₀² = ‖W‖² of every row.
        scale: s.
        detach_norm: stop the gradient at n (DoRA §4.3).

    Returns:
        {"lora_A": A, "scaled_B": s·B} and, unless the kind is LoRA, "column_scale": c [d_out]; further
        "scale_from_structure" for v2, and "position_gate", σ(position_scale), for Unified.

    Example:
        >>> W = jnp.ones((4, 3))
        >>> squared = low_rank.row_norm_squared(W)
        >>> leaves = init_leaves("dora", jax.random.key(0), 2, 3, squared)
        >>> resolve_leaves(leaves, W, squared, 2.0, detach_norm=True)["column_scale"].tolist()
        [1.0, 1.0, 1.0, 1.0]

    Source: method.md §1.
    """
    scaled_B = leaves["lora_B"] * scale
    resolved = {"lora_A": leaves["lora_A"], "scaled_B": scaled_B}
    if "magnitude" not in leaves:
        return resolved
    norm = low_rank.adapted_norm(weight, norm_squared, leaves["lora_A"], scaled_B)
    if detach_norm:
        norm = jax.lax.stop_gradient(norm)
    if "magnitude_gate" not in leaves:
        return resolved | {"column_scale": leaves["magnitude"] / norm}
    initial = low_rank.safe_sqrt(norm_squared.astype(norm.dtype))
    magnitude = low_rank.gated_magnitude(leaves["magnitude"], initial, leaves["magnitude_gate"])
    resolved["column_scale"] = low_rank.residual_blend(magnitude, norm, leaves["residual_weight"])
    if "scale_from_structure" in leaves:
        resolved["scale_from_structure"] = leaves["scale_from_structure"]
    if "position_scale" in leaves:
        resolved["position_gate"] = jax.nn.sigmoid(leaves["position_scale"])
    return resolved


def token_scale(
    resolved: Mapping[str, Array],
    factor_of: Callable[[Literal["position", "prior"]], Array],
    expert: Array | None = None,
) -> Array | None:
    """p of every token, by what the adapter's leaves ask for; None where it is 1.

    Args:
        resolved: from :func:`resolve_leaves`.
        factor_of: what the model's call knows of its tokens: t of their positions, or their structure prior.
        expert: of each token, where every expert has leaves of its own.

    Source: method.md §1.
    """

    def own(name: str) -> Array:
        return resolved[name] if expert is None else resolved[name][expert]

    if "position_gate" in resolved:
        return low_rank.position_scale(factor_of("position"), own("position_gate"))
    if "scale_from_structure" in resolved:
        return low_rank.structure_scale(factor_of("prior"), own("scale_from_structure"))
    return None


def adapted_layer(
    leaves: Mapping[str, Array],
    x: Float[Array, "*tokens d_in"],
    base_output: Float[Array, "*tokens d_out"],
    weight: Float[Array, "d_out d_in"],
    scale: float | Float[Array, ""],
    *,
    detach_norm: bool = False,
    factor: Array | None = None,
) -> Float[Array, "*tokens d_out"]:
    """The output of a layer that computes its column scale at every call.

        y = (base + δ·p)·c

    Args:
        leaves: the adapter's leaves; their names tell its kind.
        x: the layer's input (after dropout, in training).
        base_output: what the frozen layer gave.
        weight: W.
        scale: s.
        detach_norm: stop the gradient at n (DoRA §4.3).
        factor: of each token, what p depends on: t of its position, or its structure prior; None for p = 1.

    Returns:
        y in base_output's dtype.

    Example:
        >>> leaves = {"lora_A": jnp.ones((1, 3)), "lora_B": jnp.ones((2, 1))}
        >>> x, W = jnp.ones((1, 3)), jnp.ones((2, 3))
        >>> adapted_layer(leaves, x, x @ W.T, W, 2.0).tolist()
        [[9.0, 9.0]]

    Source: method.md §1.
    """
    norm_squared = low_rank.row_norm_squared(weight)
    resolved = resolve_leaves(leaves, weight, norm_squared, scale, detach_norm=detach_norm)
    p = None if factor is None else token_scale(resolved, lambda _: factor)
    delta = low_rank.low_rank_delta(x, resolved["lora_A"], resolved["scaled_B"], p)
    return low_rank.adapted_output(base_output, delta, resolved.get("column_scale"))


def to_dora(
    leaves: Mapping[str, Array],
    weight: Float[Array, "d_out d_in"],
    norm_squared: Float[Array, " d_out"],
    scale: float | Float[Array, ""],
) -> dict[str, Array]:
    """The DoRA adapter that computes what a HyLoRADA adapter does where p = 1.

    Args:
        leaves: of dora, or of one of the HyLoRADA kinds.
        weight: W.
        norm_squared: n₀² = ‖W‖² of every row.
        scale: s.

    Returns:
        {"lora_A", "lora_B", "magnitude"}, the first two as they were.

    Source: method.md §1, Collapse.
    """
    dora = {name: leaves[name] for name in KINDS["dora"]}
    if "magnitude_gate" not in leaves:
        return dora
    norm = low_rank.adapted_norm(weight, norm_squared, leaves["lora_A"], leaves["lora_B"] * scale)
    initial = low_rank.safe_sqrt(norm_squared.astype(norm.dtype))
    magnitude = low_rank.gated_magnitude(leaves["magnitude"], initial, leaves["magnitude_gate"])
    dora["magnitude"] = low_rank.collapsed_magnitude(magnitude, norm, leaves["residual_weight"])
    return dora


def from_dora(
    dora: Mapping[str, Array],
    weight: Float[Array, "d_out d_in"],
    norm_squared: Float[Array, " d_out"],
    scale: float | Float[Array, ""],
    *,
    gate_init: float,
    residual_init: float,
) -> dict[str, Array]:
    """The HyLoRADA v1 adapter that computes what a DoRA adapter does; the inverse of :func:`to_dora`.

    Args:
        dora: {"lora_A", "lora_B", "magnitude"}.
        weight: W.
        norm_squared: n₀² = ‖W‖² of every row.
        scale: s.
        gate_init: its magnitude_gate.
        residual_init: its residual_weight.

    Returns:
        The leaves of hylorada_v1, A and B as they were.

    Source: method.md §1, Collapse.
    """
    norm = low_rank.adapted_norm(weight, norm_squared, dora["lora_A"], dora["lora_B"] * scale)
    gate, residual = (jnp.asarray(value, norm.dtype) for value in (gate_init, residual_init))
    initial = low_rank.safe_sqrt(norm_squared.astype(norm.dtype))
    magnitude = low_rank.expanded_magnitude(dora["magnitude"], norm, initial, gate, residual)
    return {**dora, "magnitude": magnitude, "magnitude_gate": gate, "residual_weight": residual}
