"""Structure encoders: what HyLoRADA v2 knows of each token's place, one vector for all layers (method.md §5).

e = bucket_embeddings[bucket] + [sin θ, cos θ]  (+ structure_embeddings[id])  (+ period projection)
prior = σ(gate)·proj(LayerNorm(e))
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.math.explicit import looked_up
from hylorada_jax.math.low_rank import kaiming_init
from hylorada_jax.math.position import NUM_BUCKETS, offset_buckets, structure_buckets

# In hours: a day, a week, a month of thirty days, a year.
PERIODS = (24.0, 168.0, 720.0, 8760.0)
EMBEDDING_STD = 0.02
NORM_EPSILON = 1e-5


def leaf_shapes(
    hidden_size: int,
    encoder_type: str = "default",
    *,
    encoding_dim: int = 32,
    num_buckets: int = NUM_BUCKETS,
    max_structure_types: int = 64,
    num_periods: int = len(PERIODS),
) -> dict[str, tuple[int, ...]]:
    """The trainable leaves of an encoder, by name.

    Args:
        hidden_size: width of the prior, the config's structure_dim.
        encoder_type: "default", or "temporal", which has the periods' leaves besides.
        encoding_dim: D, even.
        num_buckets: N, buckets on either side of the middle.
        max_structure_types: distinct structure ids.
        num_periods: of the temporal encoder, 1 … 4.

    Returns:
        {leaf name: shape}.

    Example:
        >>> leaf_shapes(8, encoding_dim=4)["proj_weight"]
        (8, 4)

    Source: method.md §5.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "bucket_embeddings": (2 * num_buckets + 1, encoding_dim),
        "structure_embeddings": (max_structure_types, encoding_dim),
        "freq_scale": (encoding_dim // 2,),
        "norm_weight": (encoding_dim,),
        "norm_bias": (encoding_dim,),
        "proj_weight": (hidden_size, encoding_dim),
        "gate": (),
    }
    if encoder_type == "temporal":
        shapes["periods"] = (num_periods,)
        shapes["period_weight"] = (encoding_dim, 2 * num_periods)
    return shapes


def init_leaves(
    key: Array, hidden_size: int, encoder_type: str = "default", **sizes: int
) -> dict[str, Float[Array, "..."]]:
    """The leaves of a fresh encoder.

    The projection does not start at zero, because every layer's scale_from_structure does: of two zero
    factors neither ever receives a gradient.

    Args:
        key: a PRNG key.
        hidden_size: width of the prior.
        encoder_type: "default" or "temporal".
        **sizes: the other arguments of :func:`leaf_shapes`.

    Returns:
        {leaf name: array}, float32: embeddings N(0, 0.02²), weights Kaiming-uniform(a=√5), periods
        ``PERIODS``, freq_scale and norm_weight ones, the others zeros.

    Example:
        >>> init_leaves(jax.random.key(0), 8, "temporal")["periods"].tolist()
        [24.0, 168.0, 720.0, 8760.0]

    Source: method.md §5.
    """
    shapes = leaf_shapes(hidden_size, encoder_type, **sizes)
    leaves = {}
    for name, leaf_key in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        shape = shapes[name]
        if name.endswith("embeddings"):
            leaf = EMBEDDING_STD * jax.random.normal(leaf_key, shape, jnp.float32)
        elif name in ("proj_weight", "period_weight"):
            leaf = kaiming_init(leaf_key, *shape)
        elif name == "periods":
            leaf = jnp.asarray(PERIODS[: shape[0]], jnp.float32)
        else:
            leaf = jnp.full(shape, name in ("freq_scale", "norm_weight"), jnp.float32)
        leaves[name] = leaf
    return leaves


def structure_prior(
    leaves: Mapping[str, Array],
    positions: Int[Array, "batch seq"] | Float[Array, "batch seq"],
    structure_ids: Int[Array, "batch seq"] | None,
    seq_len: int,
) -> Float[Array, "batch seq hidden"]:
    """The structure prior of every token, once per forward pass for all layers.

        e = bucket_embeddings[bucket(⌊position⌋ − seq_len//2)] + [sin θ, cos θ]
            (+ structure_embeddings[clip(structure_ids)])  (+ period_proj([sin φ, cos φ]))
        θ_i = position·|freq_scale_i|·10000^(−i/(D/2)),   φ_j = 2π·position/|period_j|
        prior = σ(gate)·proj(LayerNorm(e))

    Args:
        leaves: of :func:`leaf_shapes`; those with periods are of a temporal encoder.
        positions: position ids, or calendar hours as floats.
        structure_ids: what the domain knows of each token: nesting depth, scale, node importance.
        seq_len: the length whose middle the buckets count from.

    Returns:
        The prior, in the leaves' dtype, at least float32.

    Example:
        >>> leaves = init_leaves(jax.random.key(0), 8)
        >>> structure_prior(leaves, jnp.arange(6).reshape(2, 3), None, 3).shape
        (2, 3, 8)

    Source: method.md §5; θ as in Vaswani et al. 2017, §3.5.
    """
    dtype = jnp.promote_types(leaves["proj_weight"].dtype, jnp.float32)
    leaves = {name: jnp.asarray(leaf, dtype) for name, leaf in leaves.items()}
    table = leaves["bucket_embeddings"]
    # Floored before the subtraction, which could round a float up to the next whole number.
    buckets = offset_buckets(structure_buckets(table.shape[0] // 2), jnp.floor(positions) - seq_len // 2)
    frequencies = jnp.abs(leaves["freq_scale"]) * jnp.asarray(falling(len(leaves["freq_scale"])), dtype)
    place = positions.astype(dtype)[..., None]
    e = looked_up(table, buckets)
    e = e + _waves(place * frequencies)
    if structure_ids is not None:
        e = e + looked_up(leaves["structure_embeddings"], structure_ids)
    if "periods" in leaves:
        calendar = _waves(2 * jnp.pi * place / jnp.abs(leaves["periods"]))
        e = e + calendar @ leaves["period_weight"].T
    e = e - e.mean(axis=-1, keepdims=True)
    e = e * jax.lax.rsqrt(jnp.mean(e * e, axis=-1, keepdims=True) + NORM_EPSILON)
    e = e * leaves["norm_weight"] + leaves["norm_bias"]
    return jax.nn.sigmoid(leaves["gate"]) * (e @ leaves["proj_weight"].T)


def falling(count: int) -> np.ndarray:
    """10000^(−i/count), what ``freq_scale`` scales.

    On the host in float64: at large positions a rounded frequency turns the wave by whole radians.

    Args:
        count: D/2.

    Example:
        >>> falling(2).tolist()
        [1.0, 0.01]
    """
    return 10000.0 ** (-np.arange(count) / count)


def _waves(angles: Array) -> Array:
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
