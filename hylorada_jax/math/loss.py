"""Logits, and cross-entropy of the tokens that are scored, in chunks: all logits never exist at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from hylorada_jax.math.kernel_rows import tpu_kind
from hylorada_jax.math.loss_blocks import block_rows, over_blocks, rows_of
from hylorada_jax.math.quantized import Kernel, as_array
from hylorada_jax.math.soft_cap import soft_capped
from hylorada_jax.trees import is_quantized

IGNORED = -1
"""The target of a token that is not scored; any negative target counts as ignored."""


def logits(
    hidden: Float[Array, "*tokens d"], head: Kernel, soft_cap: float | None = None
) -> Float[Array, "*tokens vocab"]:
    """The score of every token of the vocabulary: the one function for the loss, probes and generation.

        logits = head · hidden,   or  cap · tanh(head · hidden / cap)

    Args:
        hidden: final hidden states; their dtype is the dtype of the product's operands.
        head: output embedding [vocab, d], which may be quantised.
        soft_cap: bound of the logits (Gemma 2); None: none.

    Returns:
        The logits, float32 or wider. In bfloat16 one in dozens of greedy tokens would be another.

    Example:
        >>> logits(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [0.5, 0.0], [0.0, 0.0]])).tolist()
        [[3.0, 0.5, 0.0]]
    """
    words = as_array(head).astype(hidden.dtype)
    raw = jnp.einsum("...d,vd->...v", hidden, words, preferred_element_type=_wide(hidden.dtype))
    return soft_capped(raw, soft_cap)[0]


def token_nll(
    hidden: Float[Array, "groups tokens d"],
    head: Kernel,
    targets: Int[Array, "groups tokens"],
    *,
    soft_cap: float | None = None,
    chunk_elements: int | None = None,
    kernel: bool | None = None,
) -> Float[Array, "groups tokens"]:
    """Negative log-likelihood of each target under softmax(head · hidden), perhaps with a soft cap.

        nll_t = logsumexp(S_t) - S_t[y_t],    d nll_t / d h_t = ((softmax(S_t) - onehot(y_t)) ⊙ S'_t) W
        S_t = W h_t, S' = 1;    with a cap S_t = cap · tanh(W h_t / cap), S' = 1 - (S_t / cap)²

    A group's scored tokens are taken together, in chunks of at most ``chunk_elements / vocab``: memory does
    not grow with tokens x vocab, and what is not scored costs no product. The loop over the chunks ends when
    the group with the most scored tokens is done. The forward pass computes the gradient with respect to
    ``hidden`` on the way, while a chunk's logits are there: training costs two products with the head and
    evaluation one, where recomputing the logits in the backward pass would cost three. On a TPU, in bfloat16,
    logits never leave its fast memory (:mod:`hylorada_jax.math.loss_kernel`).

    Args:
        hidden: final hidden states, [groups, tokens, d]; their dtype is the dtype of the products. Groups may
            be divided over devices: nothing of one is moved to another.
        head: output embedding, [vocab, d]. Its gradient costs a second loop, which the compiler removes
            where nobody asks for it (a frozen head). Of one that is quantised, which has no gradient, a block
            of rows at a time is made numbers.
        targets: token ids [groups, tokens]; a negative one is ignored: nll 0, gradient 0.
        soft_cap: as in :func:`logits`.
        chunk_elements: upper bound on a group's logits held at one time (at least one token's); None takes
            2²⁴, or 2²⁶ of a vocabulary beyond 2¹⁶.
        kernel: by the kernel for TPUs, elsewhere step by step; None: where it serves, unless
            ``chunk_elements`` are given. Of these a gradient of the head still holds so many.

    Returns:
        Negative log-likelihoods in nats, [groups, tokens], float32 or wider.

    >>> nll = token_nll(jnp.zeros((1, 2, 4)), jnp.ones((10, 4)), jnp.array([[3, -1]]))
    >>> [round(float(x), 4) for x in nll[0]]
    [2.3026, 0.0]

    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (the idea of never
    materialising the logits); the gradient on the forward pass as in Liger Kernel, Hsu et al. 2024.
    """
    chunks = chosen_chunks(
        targets.shape[1], head.shape, hidden.dtype, chunk_elements, kernel, quantized=is_quantized(head)
    )
    return _token_nll(hidden, head, targets, chunks, soft_cap)


class Chunks(NamedTuple):
    """How the tokens are taken.

    Attributes:
        size: tokens of a chunk.
        part: of how many of them all logits may exist.
        kernel: by the kernel.
    """

    size: int
    part: int
    kernel: bool


def chosen_chunks(
    tokens: int,
    head: Sequence[int],
    dtype: DTypeLike,
    chunk_elements: int | None = None,
    kernel: bool | None = None,
    *,
    quantized: bool = False,
) -> Chunks:
    """How :func:`token_nll` takes a group's tokens on the platform that is traced for.

    Args:
        tokens: of a group.
        head: the head's shape, vocab and d.
        dtype: of the hidden states.
        chunk_elements: see :func:`token_nll`.
        kernel: see there.
        quantized: the head is in codes, and taken a block of rows at a time.

    Example:
        >>> chosen_chunks(4096, (151_936, 1024), jnp.bfloat16, kernel=True)
        Chunks(size=1024, part=410, kernel=True)
    """
    if quantized:
        size = chunk_tokens(tokens, block_rows(*head), chunk_elements)
        return Chunks(size, size, False)
    if kernel is None:
        kernel = chunk_elements is None and jnp.dtype(dtype) == jnp.bfloat16 and _kernel_fits(tpu_kind())
    part = chunk_tokens(tokens, head[0], chunk_elements)
    return Chunks(kernel_tokens(tokens, head[1]) if kernel else part, part, kernel)


def chunk_tokens(tokens: int, vocab: int, chunk_elements: int | None = None) -> int:
    """How many of a group's tokens :func:`token_nll` takes at a time.

    Every chunk reads the head, so a large one needs chunks of a few hundred tokens; of a small one 64 MiB of
    logits are so many. Larger chunks would hold more, and compute more that is not scored.

    Example:
        >>> [chunk_tokens(4096, vocab) for vocab in (32_000, 49_152, 128_256, 151_936)]
        [512, 316, 512, 410]
    """
    elements = chunk_elements or (2**24 if vocab <= 2**16 else 2**26)
    chunks = max(1, -(-tokens // max(1, elements // vocab)))
    return -(-tokens // chunks)


def kernel_tokens(tokens: int, width: int) -> int:
    """How many of a group's tokens the kernel takes at a time; a chunk reads the head once.

    Its sums in float32, and blocks on their way, take 18 bytes for each number of the hidden states.

    Example:
        >>> [kernel_tokens(tokens, width) for tokens, width in ((4096, 1024), (4096, 4096), (1100, 576))]
        [1024, 512, 640]
    """
    most = min(1024, max(128, 2**21 // width // 128 * 128))
    chunks = -(-tokens // most)
    return -(-tokens // chunks // 128) * 128


def _kernel_fits(kind: str | None) -> bool:
    """Whether a TPU's fast memory holds what the kernel takes: until v4 it was 32 MiB at most."""
    return kind is not None and not kind.startswith(("TPU v2", "TPU v3", "TPU v4"))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_nll(hidden: Array, head: Kernel, targets: Array, chunks: Chunks, soft_cap: float | None) -> Array:
    """The loss alone: what evaluation runs."""
    narrow = _in(hidden.dtype, head)  # once, not in every chunk

    def chunk_nll(h: Array, y: Array) -> Array:
        if chunks.kernel or is_quantized(head):
            return _nll_and_jacobian(h, y, narrow, soft_cap, with_jacobian=False)[0]
        return _nll_and_slope(h, y, narrow, soft_cap)[0]

    return _in_place(_map(chunk_nll, hidden, targets, chunks.size), targets)


def _forward(
    hidden: Array, head: Kernel, targets: Array, chunks: Chunks, soft_cap: float | None
) -> tuple[Array, tuple]:
    """The loss, and J_t = d nll_t / d h_t while the chunk's logits are there."""
    narrow = _in(hidden.dtype, head)

    def chunk_nll_and_jacobian(h: Array, y: Array) -> tuple[Array, Array | None]:
        if chunks.kernel or is_quantized(head):
            return _nll_and_jacobian(h, y, narrow, soft_cap, with_jacobian=True)
        nll, slope = _nll_and_slope(h, y, narrow, soft_cap)
        return nll, _matmul("gtv,vd->gtd", slope.astype(h.dtype), narrow).astype(h.dtype)

    nll, jacobian = _map(chunk_nll_and_jacobian, hidden, targets, chunks.size)
    return _in_place(nll, targets), (jacobian, hidden, head, targets)


def _backward(
    chunks: Chunks, soft_cap: float | None, residuals: tuple, g: Array
) -> tuple[Array, Array | None, None]:
    jacobian, hidden, head, targets = residuals
    d_hidden = (g[..., None] * _in_place(jacobian, targets).astype(g.dtype)).astype(hidden.dtype)
    if is_quantized(head):
        return d_hidden, None, None
    narrow = head.astype(hidden.dtype)
    size, most = chunks.size, chunks.part
    parts = next(n for n in range(1, size + 1) if size % n == 0 and size <= n * most)

    def add_part(d_head: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        y, h, g_part = part
        slope = g_part[..., None] * _nll_and_slope(h, y, narrow, soft_cap)[1]
        return d_head + _matmul("gtv,gtd->vd", slope.astype(h.dtype), h), None

    def add_chunk(d_head: Array, _: Array, *chunk: Array) -> Array:
        split = [jnp.moveaxis(x.reshape(len(x), parts, -1, *x.shape[2:]), 1, 0) for x in chunk]
        return jax.lax.scan(add_part, d_head, tuple(split))[0]

    zero = jnp.zeros(head.shape, _wide(hidden.dtype))
    d_head = _fold(add_chunk, zero, targets, (hidden, g), size)
    return d_hidden, d_head.astype(head.dtype), None


_token_nll.defvjp(_forward, _backward)


def _nll_and_slope(h: Array, y: Array, head: Array, soft_cap: float | None) -> tuple[Array, Array]:
    """A chunk's nll [groups, chunk] and its derivative with respect to W h [groups, chunk, vocab]."""
    scores, of_cap = soft_capped(logits(h, head), soft_cap)
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    scored = (y >= 0)[..., None]
    target_scores = jnp.take_along_axis(scores, jnp.maximum(y, 0)[..., None], axis=-1)
    nll = jnp.where(scored, normaliser - target_scores, 0)[..., 0]
    # A comparison instead of a gather or a scatter: it fuses, and needs no copy of a transposed head.
    onehot = jnp.arange(head.shape[0]) == y[..., None]
    slope = (jnp.exp(scores - normaliser) - onehot) * of_cap
    return nll, jnp.where(scored, slope, 0)


def _nll_and_jacobian(
    h: Array, y: Array, head: Kernel, soft_cap: float | None, *, with_jacobian: bool
) -> tuple[Array, Array | None]:
    """A chunk's nll [groups, chunk] and its derivative with respect to h, in h's dtype: no logits are held.

    By the kernel for TPUs, or over a quantised head.
    """
    if is_quantized(head):
        lse, mean = over_blocks(h, head, soft_cap, with_mean=with_jacobian)
    else:
        from hylorada_jax.math.loss_kernel import over_vocabulary  # what it imports has no use elsewhere

        lse, mean = over_vocabulary(h, head, soft_cap, with_mean=with_jacobian)
    own = rows_of(head, jnp.maximum(y, 0)).astype(h.dtype).astype(lse.dtype)
    scores, slope = soft_capped(jnp.sum(h.astype(lse.dtype) * own, axis=-1, keepdims=True), soft_cap)
    nll = jnp.where(y >= 0, lse - scores[..., 0], 0)
    if mean is None:
        return nll, None
    return nll, jnp.where((y >= 0)[..., None], mean - own * slope, 0).astype(h.dtype)


def _matmul(spec: str, x: Array, y: Array) -> Array:
    """A product in x's dtype, accumulated at least in float32."""
    return jnp.einsum(spec, x, y.astype(x.dtype), preferred_element_type=_wide(x.dtype))


def _in(dtype: jnp.dtype, head: Kernel) -> Kernel:
    """The head in the dtype of a product; codes stay what they are."""
    return head if is_quantized(head) else head.astype(dtype)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _fold(add: Callable[..., Any], start: Any, targets: Array, arrays: tuple[Array, ...], chunk: int) -> Any:
    """Folds ``add(total, first, y, *x)`` over the chunks [groups, chunk, ...] of the scored tokens.

    ``first`` is the number of the chunk's first token among those that are scored. Where a group has no more
    of them, y is ``IGNORED``.
    """
    tokens = targets.shape[1]
    counts = _counts(targets)
    numbers = jnp.arange(1, -(-tokens // chunk) * chunk + 1)
    # A search, for a sort takes a TPU's compiler ten seconds.
    places = jax.vmap(lambda count: jnp.searchsorted(count, numbers))(counts)

    def turn(number: Array, total: Any) -> Any:
        at = jax.lax.dynamic_slice_in_dim(places, number * chunk, chunk, axis=1)
        y = jnp.where(at < tokens, _take(targets, at), IGNORED)
        return add(total, number * chunk, y, *(_take(x, at) for x in arrays))

    return jax.lax.fori_loop(0, -(-counts[:, -1].max() // chunk), turn, start)


def _map(function: Callable[..., Any], hidden: Array, targets: Array, chunk: int) -> Any:
    """``function(h, y)`` of all chunks of scored tokens [groups, at least tokens, ...], 0 behind the last."""
    groups, tokens = targets.shape
    length = -(-tokens // chunk) * chunk

    def put(made: Any, first: Array, y: Array, h: Array) -> Any:
        part = function(h, y)
        return jax.tree.map(lambda x, p: jax.lax.dynamic_update_slice_in_dim(x, p, first, axis=1), made, part)

    shapes = [jax.ShapeDtypeStruct((groups, chunk, *x.shape[2:]), x.dtype) for x in (hidden, targets)]
    one = jax.eval_shape(function, *shapes)
    start = jax.tree.map(lambda x: jnp.zeros((groups, length, *x.shape[2:]), x.dtype), one)
    return _fold(put, start, targets, (hidden,), chunk)


def _in_place(made: Array, targets: Array) -> Array:
    """What was made of the scored tokens in their order, where they stand; 0 for the others."""
    scored = (targets >= 0).reshape(targets.shape + (1,) * (made.ndim - 2))
    return jnp.where(scored, _take(made, _counts(targets) - 1), 0)


def _counts(targets: Array) -> Array:
    """How many tokens are scored up to each, with it."""
    return jnp.cumsum(targets >= 0, axis=1)


def _take(x: Array, places: Array) -> Array:
    """x [groups, tokens, ...] at the places [groups, chunk] of every group."""
    return jnp.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 2)), axis=1, mode="clip")
