"""Logits, and cross-entropy from hidden states in chunks: the logits of all tokens never exist at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -1
"""The target of a token that is not scored; any negative target counts as ignored."""


def logits(hidden: Float[Array, "*tokens d"], head: Float[Array, "vocab d"]) -> Float[Array, "*tokens vocab"]:
    """The score of every token of the vocabulary: the one function for the loss, probes and generation.

        logits = head · hidden

    Args:
        hidden: final hidden states; their dtype is the dtype of the product's operands.
        head: output embedding.

    Returns:
        The logits, float32 or wider. In bfloat16 one in dozens of greedy tokens would be another.

    Example:
        >>> logits(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [0.5, 0.0], [0.0, 0.0]])).tolist()
        [[3.0, 0.5, 0.0]]
    """
    return jnp.einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=_wide(hidden.dtype)
    )


def token_nll(
    hidden: Float[Array, "tokens d"],
    head: Float[Array, "vocab d"],
    targets: Int[Array, "tokens"],
    *,
    chunk_elements: int = 2**24,
) -> Float[Array, "tokens"]:
    """Negative log-likelihood of each target under softmax(head · hidden).

        nll_t = logsumexp(W h_t) - (W h_t)[y_t],    d nll_t / d h_t = softmax(W h_t) W - W[y_t]

    Tokens are taken in chunks of at most ``chunk_elements / vocab``, so memory does not grow with
    tokens x vocab. The forward pass computes the gradient with respect to ``hidden`` on the way, while a
    chunk's logits are there: training costs two products with the head and evaluation one, where
    recomputing the logits in the backward pass would cost three.

    Args:
        hidden: final hidden states, [tokens, d]; their dtype is the dtype of the products.
        head: output embedding, [vocab, d]. Its gradient costs a second scan, which the compiler removes
            where nobody asks for it (a frozen head).
        targets: token ids [tokens]; a negative one is ignored: nll 0, gradient 0.
        chunk_elements: upper bound on the logits held at one time (at least one token's).

    Returns:
        Negative log-likelihoods in nats, [tokens], float32 or wider.

    >>> nll = token_nll(jnp.zeros((2, 4)), jnp.ones((10, 4)), jnp.array([3, -1]))
    >>> [round(float(x), 4) for x in nll]
    [2.3026, 0.0]

    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (the idea of never
    materialising the logits); the gradient on the forward pass as in Liger Kernel, Hsu et al. 2024.
    """
    return _token_nll(hidden, head, targets, max(1, chunk_elements // head.shape[0]))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_nll(hidden: Array, head: Array, targets: Array, chunk_tokens: int) -> Array:
    """The loss alone: what evaluation runs."""

    head = head.astype(hidden.dtype)  # once, not in every chunk

    def chunk_nll(chunk: tuple[Array, Array]) -> Array:
        return _nll_and_slope(*chunk, head)[0]

    chunks = _split(hidden, chunk_tokens, 0), _split(targets, chunk_tokens, IGNORED)
    return _join(jax.lax.map(chunk_nll, chunks), targets.shape[0])


def _forward(hidden: Array, head: Array, targets: Array, chunk_tokens: int) -> tuple[Array, tuple]:
    """The loss, and J_t = d nll_t / d h_t while the chunk's logits are there."""

    narrow = head.astype(hidden.dtype)

    def chunk_nll_and_jacobian(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        nll, slope = _nll_and_slope(*chunk, narrow)
        dtype = hidden.dtype
        return nll, _matmul("tv,vd->td", slope.astype(dtype), narrow).astype(dtype)

    chunks = _split(hidden, chunk_tokens, 0), _split(targets, chunk_tokens, IGNORED)
    nll, jacobian = (_join(x, targets.shape[0]) for x in jax.lax.map(chunk_nll_and_jacobian, chunks))
    return nll, (jacobian, hidden, head, targets)


def _backward(chunk_tokens: int, residuals: tuple, g: Array) -> tuple[Array, Array, None]:
    jacobian, hidden, head, targets = residuals
    narrow = head.astype(hidden.dtype)

    def add_chunk(d_head: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        h, y, g_chunk = chunk
        slope = g_chunk[:, None] * _nll_and_slope(h, y, narrow)[1]
        return d_head + _matmul("tv,td->vd", slope.astype(h.dtype), h), None

    fills = (hidden, 0), (targets, IGNORED), (g, 0)
    chunks = tuple(_split(x, chunk_tokens, fill) for x, fill in fills)
    d_head, _ = jax.lax.scan(add_chunk, jnp.zeros(head.shape, _wide(hidden.dtype)), chunks)
    return (g[:, None] * jacobian.astype(g.dtype)).astype(hidden.dtype), d_head.astype(head.dtype), None


_token_nll.defvjp(_forward, _backward)


def _nll_and_slope(h: Array, y: Array, head: Array) -> tuple[Array, Array]:
    """One chunk's nll [chunk] and d nll / d logits = softmax - onehot [chunk, vocab], at least float32."""
    scores = logits(h, head)
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    scored = (y >= 0)[:, None]
    target_scores = jnp.take_along_axis(scores, jnp.maximum(y, 0)[:, None], axis=-1)
    nll = jnp.where(scored, normaliser - target_scores, 0)[:, 0]
    # A comparison instead of a gather or a scatter: it fuses, and needs no copy of a transposed head.
    onehot = jnp.arange(head.shape[0]) == y[:, None]
    return nll, jnp.where(scored, jnp.exp(scores - normaliser) - onehot, 0)


def _matmul(spec: str, x: Array, y: Array) -> Array:
    """A product in x's dtype, accumulated at least in float32."""
    return jnp.einsum(spec, x, y.astype(x.dtype), preferred_element_type=_wide(x.dtype))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _split(x: Array, chunk_tokens: int, fill: int) -> Array:
    """[tokens, ...] -> [chunks, chunk, ...], padded with ``fill`` to chunks of equal size.

    Chunk i takes tokens i, i + chunks, i + 2·chunks …: where the token axis is sharded over devices every
    chunk then has its share on each device, and no chunk is gathered.
    """
    tokens = x.shape[0]
    chunks = max(1, -(-tokens // chunk_tokens))
    x = jnp.pad(x, [(0, -tokens % chunks)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, tokens: int) -> Array:
    """The inverse of ``_split``: [chunks, chunk, ...] -> [tokens, ...]."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]
