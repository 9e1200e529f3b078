"""A mixture of experts, dropless: which experts a token chooses, and products of rows sorted by expert.

    y_t = Σ_{e ∈ top_k(softmax(x_t Rᵀ))} w_te · f_e(x_t)

Each token is a row for each expert that it chooses. Sorted by expert, the rows of one follow each other, and
one ragged product is that of all experts: no row is dropped, and none is padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from hylorada_jax.math.quantized import Kernel, as_array
from hylorada_jax.placement.shards import on_rows


class Rows(NamedTuple):
    """The rows of a batch's tokens, sorted by expert within each group of tokens.

    Args:
        order: which each row was before, when a token's were side by side.
        expert: the expert of each row.
        place: where each token's rows are now, one for each of its experts.
        sizes: how many rows each expert has.
    """

    order: Int[Array, "groups rows"]
    expert: Int[Array, "groups rows"]
    place: Int[Array, "groups tokens chosen"]
    sizes: Int[Array, "groups experts"]

    @property
    def token(self) -> Int[Array, "groups rows"]:
        """The token of each row, within its group."""
        return self.order // self.place.shape[-1]


def route(
    logits: Float[Array, "*tokens experts"], chosen: int, *, normalised: bool
) -> tuple[Float[Array, "*tokens chosen"], Int[Array, "*tokens chosen"]]:
    """The experts of each token, and how much each counts.

        w = softmax(logits), of which the largest; with ``normalised`` divided by their sum

    Args:
        logits: the router's.
        chosen: how many experts a token has.
        normalised: their weights are made to sum to 1.

    Returns:
        The weights, in at least float32, and the experts.

    Example:
        >>> weights, experts = route(jnp.zeros((1, 4)).at[0, 2].set(9.0), 1, normalised=True)
        >>> weights.tolist(), experts.tolist()
        ([[1.0]], [[2]])

    Source: Shazeer et al. 2017, arXiv:1701.06538, §2.1; Jiang et al. 2024, arXiv:2401.04088, §2.1.
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights, experts = lax.top_k(jax.nn.softmax(wide, axis=-1), chosen)
    return weights / weights.sum(axis=-1, keepdims=True) if normalised else weights, experts


def sort_rows(experts: Int[Array, "groups tokens chosen"], count: int) -> Rows:
    """The rows of the experts that tokens have chosen.

    Args:
        experts: from :func:`route`.
        count: how many experts there are.

    Example:
        >>> rows = sort_rows(jnp.array([[[1, 0], [1, 2]]]), 3)
        >>> rows.token.tolist(), rows.sizes.tolist()
        ([[0, 0, 1, 1]], [[1, 2, 1]])
    """
    flat = experts.reshape(len(experts), -1)
    order = jnp.argsort(flat, axis=-1)
    sizes = jnp.sum(flat[..., None] == jnp.arange(count), axis=1, dtype=jnp.int32)
    place = jnp.argsort(order, axis=-1).reshape(experts.shape)
    return Rows(order, jnp.take_along_axis(flat, order, axis=-1), place, sizes)


def rows_of(x: Float[Array, "groups tokens *d"], rows: Rows) -> Float[Array, "groups rows *d"]:
    """What each row's token has."""
    return _taken(x, rows.token)


def in_order(x: Float[Array, "groups unsorted *d"] | Bool[Array, "groups unsorted *d"], rows: Rows) -> Array:
    """What each row has of what is side by side for a token's, [groups, rows, …]."""
    return _taken(x, rows.order)


def _taken(x: Array, index: Array) -> Array:
    return jax.vmap(lambda x, index: x[index])(x, index)


def sum_rows(
    y: Float[Array, "groups rows d"], weights: Float[Array, "groups tokens chosen"], rows: Rows
) -> Float[Array, "groups tokens d"]:
    """The sum over each token's rows, Σ w·y, in y's dtype and summed in at least float32."""
    own = _taken(y, rows.place)
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.einsum("gtkd,gtk->gtd", own, weights.astype(y.dtype), preferred_element_type=wide).astype(
        y.dtype
    )


def experts_dot(
    x: Float[Array, "groups rows d_in"], kernel: Kernel, rows: Rows, dtype: DTypeLike | None = None
) -> Float[Array, "groups rows d_out"]:
    """The product of each row with its expert's matrix, y_r = x_r · kernel[expert of r].

    On a mesh each device computes the groups of its own rows of the batch. TPUs multiply what is there; XLA
    for CPUs and GPUs may multiply every row with every expert, and mask.

    Args:
        x: the rows.
        kernel: [experts, d_in, d_out], perhaps quantised; made numbers again in the backward pass.
        rows: from :func:`sort_rows`.
        dtype: of y, in which products are summed; None: x's.
    """
    dtype = jnp.dtype(dtype or x.dtype)

    def own(x: Array, kernel: Kernel, sizes: Array) -> Array:
        if len(x) == 1:
            return _product(x[0], kernel, sizes[0], dtype)[None]
        return jax.vmap(lambda x, sizes: _product(x, kernel, sizes, dtype))(x, sizes)

    return on_rows(own, x, kernel, rows.sizes)


def low_rank_delta(
    x: Float[Array, "groups rows d_in"],
    lora_A: Float[Array, "experts r d_in"],
    scaled_B: Float[Array, "experts d_out r"],
    rows: Rows,
    token_scale: Float[Array, "groups rows"] | None = None,
) -> Float[Array, "groups rows d_out"]:
    """The low-rank update of each row by its expert's adapter.

        δ_r = (x_r Aᵀ)(s·B)ᵀ·p_r          A and B of the expert of r

    Args:
        x: the rows (after dropout, in training).
        lora_A: A of each expert.
        scaled_B: s·B of each.
        rows: from :func:`sort_rows`.
        token_scale: p of each row, or None for p = 1.

    Returns:
        δ in at least float32, as :func:`hylorada_jax.math.low_rank.low_rank_delta` takes it.

    Source: Hu et al. 2021, §4.1; method.md §1.
    """
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    hidden = experts_dot(x, lora_A.astype(x.dtype).swapaxes(1, 2), rows, accumulator)
    if token_scale is not None:
        hidden = hidden * token_scale[..., None]
    return experts_dot(hidden.astype(x.dtype), scaled_B.astype(x.dtype).swapaxes(1, 2), rows, accumulator)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, kernel: Kernel, sizes: Array, dtype: DTypeLike) -> Array:
    return _ragged_dot(x, as_array(kernel), sizes, dtype)


def _forward(x: Any, kernel: Any, sizes: Any, dtype: DTypeLike) -> tuple[Array, Any]:
    # Rows are kept for a kernel that trains alone: those of frozen experts would be the most of all that is.
    trains = any(leaf.perturbed for leaf in jax.tree.leaves(kernel, is_leaf=_is_primal))
    kernel = jax.tree.map(lambda leaf: leaf.value, kernel, is_leaf=_is_primal)
    y = _ragged_dot(x.value, as_array(kernel), sizes.value, dtype)
    return y, (x.value if trains else None, kernel, sizes.value, jnp.zeros(0, x.value.dtype))


def _backward(dtype: DTypeLike, kept: Any, dy: Any) -> tuple[Any, Any, None]:
    x, kernel, sizes, like = kept
    if isinstance(dy, SymbolicZero):
        return None, None, None
    dy = dy.astype(like.dtype)
    dx = _ragged_dot(dy, as_array(kernel).swapaxes(1, 2), sizes, like.dtype)
    return dx, None if x is None else _kernels(x, dy, sizes, kernel.dtype), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


# jax maps a ragged product over rows of a batch only where each has kernels of its own. So they take turns.
def _ragged_dot(x: Array, kernel: Array, sizes: Array, dtype: DTypeLike) -> Array:
    @jax.custom_batching.sequential_vmap
    def product(x: Array, kernel: Array, sizes: Array) -> Array:
        return lax.ragged_dot(x, kernel, sizes, preferred_element_type=dtype)

    return product(x, kernel, sizes)


def _kernels(x: Array, dy: Array, sizes: Array, dtype: DTypeLike) -> Array:
    """What changes each expert's kernel: xᵀ · dy over its own rows.

    lax.ragged_dot_general would take the rows once for each expert, on a TPU too. Here the narrower of the
    two is so taken: of an adapter, its rank.
    """
    if x.shape[1] < dy.shape[1]:
        return _kernels(dy, x, sizes, dtype).swapaxes(1, 2)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(dy))[:, None]
    own = (ends - sizes <= row) & (row < ends)
    apart = jnp.where(own[:, :, None], dy[:, None], 0)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("ri,reo->eio", x, apart, preferred_element_type=wide).astype(dtype)
