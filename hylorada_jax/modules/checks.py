"""What the layers ask of their settings and of what they are called with, in Linen and in NNX alike."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hylorada_jax.config import check_linear_layer, check_lora_a
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math import structure
from hylorada_jax.math.position import MAX_DISTANCE, NUM_BUCKETS, check_positions


def check_linear(layer: Any) -> None:
    """Refuses the sizes of a linear adapter, its alpha, or a start of its lora_A, that there are not."""
    check_linear_layer(type(layer).__name__, layer.in_features, layer.out_features, layer.rank, layer.alpha)
    check_lora_a(layer.lora_A_init, layer.lora_A_gain)


def check_linear_call(layer: Any, x: Array, base_output: Array, base_weight: Array) -> None:
    """Refuses arrays that are not of a linear adapter's sizes."""
    d_in, d_out = layer.in_features, layer.out_features
    expected = ((*x.shape[:-1], d_in), (*x.shape[:-1], d_out), (d_out, d_in))
    if (x.shape, base_output.shape, base_weight.shape) != expected:
        raise ConfigError(
            f"{type(layer).__name__}({d_in}, {d_out}): x is [..., {d_in}], base_output [..., {d_out}] and "
            f"base_weight [{d_out}, {d_in}].",
            f"x {x.shape}, base_output {base_output.shape}, base_weight {base_weight.shape}",
            "Give the sizes of the frozen layer, and kernel.T as base_weight.",
        )


def check_weight(layer: Any, base_weight: Array) -> None:
    """Refuses a weight that is not of a linear adapter's sizes."""
    if base_weight.shape != (expected := (layer.out_features, layer.in_features)):
        raise ConfigError(
            f"{type(layer).__name__}{expected[::-1]}: base_weight is {list(expected)}.",
            f"base_weight {base_weight.shape}",
            "Give the sizes of the frozen layer, and kernel.T as base_weight.",
        )


def refuse_prior(structure_prior: Any) -> None:
    """Refuses a structure prior where nothing reads it."""
    if structure_prior is not None:
        raise ConfigError(
            "HyLoRADALinear (v1) takes no structure prior.",
            getattr(structure_prior, "shape", structure_prior),
            "Use HyLoRADAv2Linear, which reads it by its scale_from_structure.",
        )


def check_deterministic(deterministic: Any) -> None:
    """Refuses what is not true or false: a structure prior in its place, which nothing would read."""
    if deterministic is not None and jnp.ndim(deterministic):
        raise ConfigError(
            "deterministic says whether nothing is dropped, True or False.",
            f"an array {jnp.shape(deterministic)}",
            "A structure prior is read by HyLoRADAv2Linear alone.",
        )


def check_prior(prior: Array, x: Array, structure_dim: int) -> None:
    """Refuses a structure prior that is not one row for every token."""
    expected = (*jnp.shape(x)[:-1], structure_dim)
    if prior.shape != expected:
        raise DataError(
            "structure_prior is [*tokens, structure_dim], one row for every token of x.",
            f"structure_prior {prior.shape}, expected {expected}",
            "Give the encoder the positions of the same tokens, and hidden_size=structure_dim.",
        )


def token_positions(positions: Any, tokens: tuple[int, ...]) -> Array:
    """The checked positions of tokens of a shape; without any they are 0, 1, 2 … in each row."""
    if positions is None:
        positions = jnp.indices((1, *tokens), jnp.int32)[-1, 0]
    positions = jnp.asarray(positions)
    check_positions(positions, tokens)
    return positions


def check_buckets(num_buckets: int) -> None:
    """Refuses a number of buckets that a position bias cannot have."""
    if not 2 <= num_buckets <= MAX_DISTANCE:
        rule = f"PositionBias: num_buckets is 2 … {MAX_DISTANCE}."
        raise ConfigError(rule, num_buckets, f"The default is {NUM_BUCKETS}.")


def check_heads(layer: Any) -> None:
    """Refuses a number of heads that no attention has."""
    if layer.num_heads < 1:
        rule = f"{type(layer).__name__}: num_heads must be ≥ 1."
        raise ConfigError(rule, layer.num_heads, "Give the number of query heads.")


def check_scores(layer: Any, scores: Array) -> None:
    """Refuses attention scores of another number of heads."""
    check_heads(layer)
    if scores.ndim != 4 or scores.shape[1] != layer.num_heads:
        raise ConfigError(
            f"{type(layer).__name__}: scores are [batch, num_heads, query, key].",
            f"scores {scores.shape}, num_heads={layer.num_heads}",
            "Give num_heads the number of query heads.",
        )


def score_positions(scores: Array, query_positions: Any, key_positions: Any) -> tuple[Array, Array]:
    """The checked positions of queries and keys; of self-attention without any they are 0, 1, 2 …"""
    batch, _, queries, keys = scores.shape
    alone = query_positions is None and key_positions is None and queries == keys
    if not alone and (query_positions is None or key_positions is None):
        raise DataError(
            "PositionalDAA needs the positions of queries and keys, or of neither in self-attention.",
            f"{queries} queries, {keys} keys, query_positions={query_positions}, "
            f"key_positions={key_positions}",
            "Pass both; with a KV cache the queries stand after the keys of earlier tokens.",
        )
    return token_positions(query_positions, (batch, queries)), token_positions(key_positions, (batch, keys))


def check_sparse(layer: Any) -> None:
    """Refuses a sparse adapter's settings that are out of range."""
    if layer.adapter_dim < 1 or not 0 < layer.topk_ratio <= 1 or not layer.temperature > 0:
        raise ConfigError(
            f"{type(layer).__name__}: adapter_dim ≥ 1, 0 < topk_ratio ≤ 1 and temperature > 0.",
            f"adapter_dim={layer.adapter_dim}, topk_ratio={layer.topk_ratio}, "
            f"temperature={layer.temperature}",
            "The defaults are 128, 0.1 and 1.",
        )


def check_hidden(layer: Any, hidden_size: int, h: Array | None = None) -> None:
    """Refuses a sparse adapter of no features, or an h of another width."""
    if hidden_size < 1 or (h is not None and h.shape[-1:] != (hidden_size,)):
        raise ConfigError(
            f"{type(layer).__name__}: h is [..., hidden_size], hidden_size ≥ 1.",
            f"hidden_size={hidden_size}" + ("" if h is None else f", h {h.shape}"),
            "Give the width of the MLP block's output.",
        )


def check_encoder(layer: Any) -> None:
    """Refuses a structure encoder's sizes that are out of range."""
    sizes = (layer.hidden_size, layer.encoding_dim, layer.num_buckets - 1, layer.max_structure_types)
    if min(sizes) < 1 or layer.encoding_dim % 2:
        raise ConfigError(
            f"{type(layer).__name__}: encoding_dim is even and ≥ 2, num_buckets ≥ 2, hidden_size and "
            "max_structure_types ≥ 1.",
            f"encoding_dim={layer.encoding_dim}, num_buckets={layer.num_buckets}, "
            f"hidden_size={layer.hidden_size}, max_structure_types={layer.max_structure_types}",
            "The defaults are 32, 64, 32 and 64.",
        )


def check_periods(num_periods: int) -> None:
    """Refuses a number of periods that there is not."""
    if not 1 <= num_periods <= len(structure.PERIODS):
        raise ConfigError(
            f"num_periods is 1 … {len(structure.PERIODS)}, of the periods {structure.PERIODS}.",
            num_periods,
            "Leave it out for all of them.",
        )


def check_structure(positions: Array, structure_ids: Array | None) -> None:
    """Refuses positions and structure ids that are not one of each for every token."""
    if jnp.issubdtype(positions.dtype, jnp.integer) and positions.ndim == 2:
        check_positions(positions)
    elif positions.ndim != 2:
        raise DataError("positions are [batch, seq].", positions.shape, "Give one position to every token.")
    if structure_ids is None:
        return
    if structure_ids.shape != positions.shape or not jnp.issubdtype(structure_ids.dtype, jnp.integer):
        raise DataError(
            "structure_ids are integers [batch, seq], one for every position.",
            f"structure_ids {structure_ids.dtype} {structure_ids.shape}, positions {positions.shape}",
            "Make them from the same tokens as the positions.",
        )
