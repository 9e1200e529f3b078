"""The sparse adapter: a bottleneck of which a learned gate leaves only the best units on (method.md §4).

out = h + up(dropout(gelu(down(h) ⊙ mask)))
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from hylorada_jax.exact import fraction
from hylorada_jax.math.low_rank import kaiming_init

SCORE_STD = 0.02


def units_on(topk_ratio: float, adapter_dim: int) -> int:
    """How many units the gate leaves on.

        k = max(1, ⌊ratio·adapter_dim⌋)

    Args:
        topk_ratio: in (0, 1].
        adapter_dim: units in all.

    Returns:
        k.

    Example:
        >>> units_on(0.1, 128), units_on(0.1, 4)
        (12, 1)

    Source: method.md §4.
    """
    return max(1, math.floor(fraction(topk_ratio) * adapter_dim))


def leaf_shapes(adapter_dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The trainable leaves of one sparse adapter, by name.

    Args:
        adapter_dim: units.
        hidden: width of the block's output.

    Returns:
        {leaf name: shape}.

    Example:
        >>> leaf_shapes(2, 3)
        {'down': (2, 3), 'up': (3, 2), 'gate_scores': (2,)}

    Source: method.md §4.
    """
    return {"down": (adapter_dim, hidden), "up": (hidden, adapter_dim), "gate_scores": (adapter_dim,)}


def init_leaves(
    key: Array, adapter_dim: int, hidden: int, dtype: DTypeLike = jnp.float32
) -> dict[str, Array]:
    """The leaves of a fresh sparse adapter, which changes nothing: up is 0.

    Args:
        key: a PRNG key.
        adapter_dim: units.
        hidden: width of the block's output.
        dtype: of the leaves.

    Returns:
        {"down": Kaiming-uniform(a=√5), "up": zeros, "gate_scores": N(0, 0.02²)}.

    Example:
        >>> {name: leaf.shape for name, leaf in init_leaves(jax.random.key(0), 2, 3).items()}
        {'down': (2, 3), 'up': (3, 2), 'gate_scores': (2,)}

    Source: method.md §4.
    """
    down_key, gate_key = jax.random.split(key)
    return {
        "down": kaiming_init(down_key, adapter_dim, hidden).astype(dtype),
        "up": jnp.zeros((hidden, adapter_dim), dtype),
        "gate_scores": (SCORE_STD * jax.random.normal(gate_key, (adapter_dim,), jnp.float32)).astype(dtype),
    }


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def topk_mask(gate_scores: Float[Array, " units"], k: int, temperature: float) -> Float[Array, " units"]:
    """The gate: 1 for the k largest scores, 0 for the others, with a straight-through gradient.

        mask_i = 1 if score_i is among the k largest, else 0
        ∂mask := ∂(units·softmax(scores/τ))

    Args:
        gate_scores: one score per unit; of equal ones the first wins.
        k: units left on.
        temperature: τ > 0; the smaller, the more the gradient is about the largest scores.

    Returns:
        The mask, exactly 0 and 1, in gate_scores' dtype.

    Example:
        >>> topk_mask(jnp.array([0.1, 0.3, 0.2]), 2, 1.0).tolist()
        [0.0, 1.0, 1.0]

    Source: method.md §4; straight-through estimator: Bengio et al. 2013, §4.
    """
    return jnp.zeros_like(gate_scores).at[jax.lax.top_k(gate_scores, k)[1]].set(1)


@topk_mask.defjvp
def _straight_through(
    k: int, temperature: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    def soft(scores: Array) -> Array:
        return scores.size * jax.nn.softmax(scores / temperature)

    return topk_mask(*primals, k, temperature), jax.jvp(soft, primals, tangents)[1]


def units(
    h: Float[Array, "*tokens hidden"], down: Float[Array, "units hidden"], mask: Float[Array, " units"]
) -> Float[Array, "*tokens units"]:
    """The units of the bottleneck.

        gelu(down(h) ⊙ mask)          gelu exact, by erf

    Args:
        h: an MLP block's output.
        down: into the bottleneck.
        mask: of :func:`topk_mask`.

    Returns:
        The units in at least float32; the product takes its operands in h's dtype. A unit that is off is 0.

    Example:
        >>> units(jnp.ones((1, 2)), jnp.full((2, 2), 5.0), jnp.array([0.0, 1.0])).tolist()
        [[0.0, 10.0]]

    Source: method.md §4.
    """
    accumulator = jnp.promote_types(h.dtype, jnp.float32)
    projected = jnp.einsum("...h,uh->...u", h, down.astype(h.dtype), preferred_element_type=accumulator)
    return jax.nn.gelu(projected * mask.astype(accumulator), approximate=False)


def add_units(
    h: Float[Array, "*tokens hidden"], units: Float[Array, "*tokens units"], up: Float[Array, "hidden units"]
) -> Float[Array, "*tokens hidden"]:
    """The block's output with its sparse adapter.

        out = h + up(units)

    Args:
        h: the block's output.
        units: of :func:`units`, after dropout in training.
        up: out of the bottleneck.

    Returns:
        out in h's dtype. The product takes its operands in h's dtype and accumulates in float32, where the
        sum is taken too.

    Example:
        >>> add_units(jnp.ones((1, 2)), jnp.ones((1, 3)), jnp.ones((2, 3))).tolist()
        [[4.0, 4.0]]

    Source: method.md §4; bottleneck adapters: Houlsby et al. 2019, §2.1.
    """
    accumulator = jnp.promote_types(h.dtype, jnp.float32)
    update = jnp.einsum(
        "...u,hu->...h", units.astype(h.dtype), up.astype(h.dtype), preferred_element_type=accumulator
    )
    return (h.astype(accumulator) + update).astype(h.dtype)
