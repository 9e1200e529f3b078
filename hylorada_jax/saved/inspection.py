"""What a saved adapter has learned, in numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.leaves import POSITION_BIAS, STRUCTURE_ENCODER
from hylorada_jax.math import attention, linear_adapter, low_rank, sparse, structure
from hylorada_jax.math.position import MAX_DISTANCE, NUM_BUCKETS, position_buckets, relative_buckets
from hylorada_jax.saved.saved_adapter import SavedAdapter
from hylorada_jax.surgery.layout import check_keys
from hylorada_jax.surgery.targets import layer_alphas

Leaves = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
_GATES = {"g": "magnitude_gate", "beta": "residual_weight", "position_gate": "position_scale"}


def inspect_adapter(
    saved: SavedAdapter, weight_of: Callable[[str], jax.Array] | None = None
) -> dict[str, Any]:
    """What an adapter has learned, from its files; and beside its base, where the base is given.

    Args:
        saved: from :func:`hylorada_jax.saved.saved_adapter.open_adapter`.
        weight_of: W [d_out, d_in] of a layer's name; None leaves out what takes it.

    Returns:
        JSON-able. ``linear``, for each layer: ``rank``; ``update_norm``, ‖s·BA‖ (Frobenius);
        ``effective_rank`` of BA, and of A (``effective_rank_A``); ``g``, ``beta``, ``position_gate`` and
        ``structure_norm`` where it has them; with weights ``relative_norm``, ‖s·BA‖/‖W‖, and
        ``column_scale``, the least and the largest c. ``attention``, for each layer: ``alpha`` of the heads
        and ``bias``, [heads] for each of ``distances``. ``position_factor``: t from each of ``positions`` on.
        ``structure``: frequencies, periods and the gate. ``sparse``, for each layer: the units that are on
        and the norm of ``up``.

    Raises:
        CheckpointError: the adapter is damaged, or has other tensors than its config calls for.

    Source: method.md §§1–5.
    """
    config = saved.config
    check_keys(saved.shapes, _wanted(saved.shapes, config))
    layers = _by_layer(saved.tensors())
    adapted = {name: leaves for name, leaves in layers.items() if "lora_A" in leaves}
    ranks = {name: leaves["lora_A"].shape[0] for name, leaves in adapted.items()}
    alphas = layer_alphas(ranks, list(ranks), config, strict=False)
    found: dict[str, Any] = {"method": config.method, "base_model": saved.base["name"]}
    found["linear"] = [
        {"name": name} | _linear(leaves, config.scale(ranks[name], alphas[name]), name, weight_of)
        for name, leaves in adapted.items()
    ]
    if attentions := {name: leaves for name, leaves in layers.items() if "alpha" in leaves}:
        ahead = relative_buckets()[MAX_DISTANCE - 1 :]  # of keys at or before the query
        buckets, starts = np.unique(ahead, return_index=True)
        found["distances"] = starts.tolist()
        found["attention"] = [
            {"name": name, "alpha": leaves["alpha"].tolist()}
            | ({"bias": leaves["position_bias"][buckets].tolist()} if "position_bias" in leaves else {})
            for name, leaves in attentions.items()
        ]
    if POSITION_BIAS in (top := layers.get("", {})):
        buckets, starts = np.unique(position_buckets(len(top[POSITION_BIAS])), return_index=True)
        found["positions"] = starts.tolist()
        found["position_factor"] = np.tanh(top[POSITION_BIAS][buckets]).tolist()
    if encoder := layers.get(STRUCTURE_ENCODER):
        found["structure"] = _encoder(encoder)
    if gated := {name: leaves for name, leaves in layers.items() if "gate_scores" in leaves}:
        on = sparse.units_on(config.sparse_topk_ratio, config.sparse_adapter_dim)
        found["sparse"] = [
            {
                "name": name,
                "units": sorted(np.argsort(-leaves["gate_scores"], kind="stable")[:on].tolist()),
                "up_norm": float(np.linalg.norm(leaves["up"])),
            }
            for name, leaves in gated.items()
        ]
    return found


def effective_rank(values: np.ndarray) -> float:
    """How many directions a matrix has, counted by their weight.

        exp(-Σ_i p_i ln p_i),  p_i = σ_i / Σ_j σ_j

    Args:
        values: its singular values σ.

    Returns:
        1 … as many as they are; 0 where all are 0.

    Example:
        >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 6)
        2.0

    Source: Roy and Vetterli 2007, "The effective rank", definition 1.
    """
    if not values.sum() > 0:
        return 0.0
    parts = values[values > 0] / values.sum()
    return float(np.exp(-(parts * np.log(parts)).sum()))


def singular_values(left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """Those of a matrix, or of a product of two, which is never formed; nor is [r, r].

    Args:
        left: [m, r].
        right: [r, n].

    Returns:
        In float64, the largest first; as many as the least of the sizes.
    """
    factor = left.astype(float)
    if right is not None:
        _, ours = np.linalg.qr(factor)
        _, theirs = np.linalg.qr(right.T.astype(float))
        factor = ours @ theirs.T
    return np.linalg.svd(factor, compute_uv=False)


def _linear(
    leaves: Leaves,
    scale: float,
    name: str,
    weight_of: Callable[[str], jax.Array] | None,
) -> dict[str, Any]:
    A, B = leaves["lora_A"], leaves["lora_B"]
    values = singular_values(B, A)
    norm = abs(scale) * float(np.linalg.norm(values))
    found: dict[str, Any] = {
        "rank": len(A),
        "update_norm": norm,
        "effective_rank": effective_rank(values),
        "effective_rank_A": effective_rank(singular_values(A)),
    }
    for key, leaf in _GATES.items():
        if leaf in leaves:
            found[key] = float(jax.nn.sigmoid(leaves[leaf]))
    if "scale_from_structure" in leaves:
        found["structure_norm"] = float(np.linalg.norm(leaves["scale_from_structure"]))
    if weight_of is not None:
        weight = weight_of(name)
        initial = low_rank.row_norm_squared(weight)
        found["relative_norm"] = norm / float(jnp.sqrt(initial.sum()))
        arrays = {leaf: jnp.asarray(value) for leaf, value in leaves.items()}
        resolved = linear_adapter.resolve_leaves(arrays, weight, initial, scale, detach_norm=False)
        if "column_scale" in resolved:
            c = resolved["column_scale"]
            found["column_scale"] = [float(c.min()), float(c.max())]
    return found


def _encoder(leaves: Leaves) -> dict[str, Any]:
    frequencies = np.abs(leaves["freq_scale"]) * structure.falling(len(leaves["freq_scale"]))
    found = {"gate": float(jax.nn.sigmoid(leaves["gate"])), "frequencies": frequencies.tolist()}
    if "periods" in leaves:
        found["periods"] = np.abs(leaves["periods"]).tolist()
    return found


def _by_layer(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{layer: {leaf's name in the file: tensor}}, layer 2 before layer 10; the whole model's under ""."""
    layers: dict[str, dict[str, Any]] = {}
    for name in sorted(tensors, key=_natural):
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = tensors[name]
    return layers


def _natural(name: str) -> list[Any]:
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]{1,9})", name))]


def _wanted(shapes: Mapping[str, Shape], config: HyLoRADAConfig) -> dict[str, Shape]:
    """The tensors that the config calls for at the layers that the file names, whatever their widths."""
    wanted: dict[str, Shape] = {}
    for layer, found in _by_layer(shapes).items():
        sizes = {leaf: [*(max(size, 1) for size in shape), 1, 1] for leaf, shape in found.items()}
        own: dict[str, Shape]
        if layer == STRUCTURE_ENCODER and config.use_hylorada_v2:
            own = structure.leaf_shapes(config.structure_dim, config.structure_encoder_type)
        elif layer == "" and config.position_bias_enabled:
            own = {POSITION_BIAS: (NUM_BUCKETS,)}
        elif "lora_A" in found and "lora_B" in found and config.linear:
            rank, d_in = sizes["lora_A"][:2]
            own = linear_adapter.leaf_shapes(
                config.linear, rank, d_in, sizes["lora_B"][0], structure_dim=config.structure_dim
            )
        elif "alpha" in found and config.daa_enabled:
            own = attention.leaf_shapes(sizes["alpha"][0], position_bias=bool(config.daa_position_bias))
        elif "up" in found and config.sparse_enabled:
            own = sparse.leaf_shapes(config.sparse_adapter_dim, sizes["up"][0])
        else:  # of the base: whatever is unfrozen
            own = found if config.train_embeddings or config.train_norms else {}
        wanted |= {f"{layer}.{leaf}".removeprefix("."): shape for leaf, shape in own.items()}
    return wanted
