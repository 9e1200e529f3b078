"""The loss over a quantised head: its rows are made numbers a block at a time, and no logits are held.

As :mod:`hylorada_jax.math.loss_kernel`, whose two sums these are, in the compiler's own operations.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from hylorada_jax.math.quantized import Kernel, as_array
from hylorada_jax.math.soft_cap import soft_capped

# What of the head is made numbers at a time: 32 MiB in bfloat16, 2,048 rows of 8,192.
_NUMBERS = 2**24


def block_rows(vocab: int, width: int) -> int:
    """The rows of a block.

    Example:
        >>> block_rows(151_936, 1024), block_rows(100, 1024)
        (16384, 100)
    """
    return min(vocab, max(1, _NUMBERS // width))


def rows_of(head: Kernel, numbers: Array) -> Array:
    """Rows of a head, which may be quantised, by their numbers, [*numbers, d]."""
    return as_array(jax.tree.map(lambda leaf: jnp.take(leaf, numbers, axis=0), head))


def over_blocks(
    hidden: Float[Array, "groups tokens d"],
    head: Kernel,
    soft_cap: float | None,
    *,
    with_mean: bool,
) -> tuple[Float[Array, "groups tokens"], Float[Array, "groups tokens d"] | None]:
    """lse of every token and, where it is asked for, mean, float32 or wider.

        lse_t = log Σ_v exp S_tv,   mean_t = Σ_v softmax(S_t)_v S'_tv W_v,   S_t = W h_t, or with a soft cap

    Args:
        hidden: hidden states; their dtype is that of the products.
        head: output embedding [vocab, d], quantised.
        soft_cap: bound of the logits; None: none.
        with_mean: what the gradient needs, for one product more.

    Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (a softmax in one pass).
    """
    vocab, width = head.shape
    block, wide = block_rows(vocab, width), jnp.promote_types(hidden.dtype, jnp.float32)

    def add(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, *weighted = sums
        start = jnp.minimum(number * block, vocab - block)  # the last block begins among known rows
        rows = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, block), head)
        words = as_array(rows).astype(hidden.dtype)
        scores = jnp.einsum("gtd,vd->gtv", hidden, words, preferred_element_type=wide)
        scores, slope = soft_capped(scores, soft_cap)
        scores = jnp.where(start + jnp.arange(block) < number * block, -jnp.inf, scores)
        highest = jnp.maximum(top, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
        total = kept * total + weights.sum(axis=-1)
        if weighted:
            slopes = (weights * slope).astype(hidden.dtype)
            product = jnp.einsum("gtv,vd->gtd", slopes, words, preferred_element_type=wide)
            weighted = [kept[..., None] * weighted[0] + product]
        return highest, total, *weighted

    tokens = hidden.shape[:2]
    start: tuple[Any, ...] = jnp.full(tokens, -jnp.inf, wide), jnp.zeros(tokens, wide)
    if with_mean:
        start += (jnp.zeros(hidden.shape, wide),)
    top, total, *weighted = lax.fori_loop(0, -(-vocab // block), add, start)
    return top + jnp.log(total), weighted[0] / total[..., None] if weighted else None
