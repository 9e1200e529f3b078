"""Attention without the square of the row, in plain JAX: a block of queries and a block of keys at a time.

Forward, the softmax is taken online: a running maximum m, and with it the sums l = Σ exp(S − m) and
o = Σ exp(S − m)·v, which are rescaled where m grows. Backward, a block's weights come back from its logits
and from what is kept of each row, lse = m + log l:

    p = exp(S − lse),   dv = pᵀg,   dS = p ⊙ (g vᵀ − Σ g ⊙ out),   dq = dS k,   dk = dSᵀ q

A sink z is a logit without a value: before any key, m = z and l = 1. Its gradient is −Σ exp(z − lse)·(g·out).

Blocks that causality, a window or the documents hide are not visited.

Source: Dao et al., FlashAttention, arXiv:2205.14135 §3.1 and App. B; Rabe and Staats, arXiv:2112.05682.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hylorada_jax.math.blocks import (
    Sides,
    Tokens,
    Visits,
    block_pattern,
    block_size,
    cut,
    cut_pattern,
    find_visits,
)
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.relative_bias import all_buckets, band, bias_of_offsets, few_buckets
from hylorada_jax.math.remat import named_output
from hylorada_jax.math.soft_cap import soft_capped

# Tokens of a block, at most.
BLOCK = 256


class _Bias(NamedTuple):
    """The bias of a block.

    Attributes:
        of: of what is read for it.
        read: the table, or the line that the block needs.
    """

    of: Callable[[Array], Array]
    read: Array


class _Setting(NamedTuple):
    """What is the same in all blocks, and static.

    Attributes:
        scale: of the logits.
        soft_cap: of the logits.
        causal: whether later keys are hidden.
        banded: the bias comes as lines, of which each pair of blocks reads one; else as the table.
    """

    scale: float
    soft_cap: float | None
    causal: bool
    banded: bool


def blockwise_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    pattern: Pattern,
    *,
    scale: float,
    soft_cap: float | None = None,
    position_bias: Float[Array, "buckets heads_or_1"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """:func:`~hylorada_jax.math.attention.attention` in memory that grows with the length of the rows.

    Args:
        query: queries, multiplied by α.
        key: keys; heads is a multiple of kv_heads.
        value: values.
        pattern: which keys each query sees.
        scale: of the logits.
        soft_cap: bound of the logits before the bias is added; None: none.
        position_bias: a bias per bucket of distances and head.
        sinks: a logit per query head that has no value; None: none.

    Returns:
        The attended values in query's dtype; logits and sums are in float32 at least.

    Example:
        >>> q = jnp.ones((1, 3, 4, 8)); kv = jnp.ones((1, 3, 2, 8))
        >>> blockwise_attention(q, kv, kv, Pattern.of_rows(jnp.array([[0, 1, 2]])), scale=1.0).shape
        (1, 3, 4, 8)
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, dtype = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)
    of_queries, of_keys = block_size(length, BLOCK), block_size(key.shape[1], BLOCK)
    bias, banded = None, pattern.own and pattern.counted
    if position_bias is not None:
        bias = jnp.broadcast_to(position_bias.astype(dtype), (len(position_bias), heads))
        bias = _lines(bias, of_queries, -(-length // of_queries)) if banded else bias
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    out, seen = _attend(
        _Setting(scale, soft_cap, pattern.causal, banded),
        cut(jnp.moveaxis(grouped, 1, 3), 3, of_queries),
        *(cut(jnp.moveaxis(x, 1, 2), 2, of_keys) for x in (key, value)),
        bias,
        None if sinks is None else sinks.astype(dtype),
        cut_pattern(pattern, of_queries, of_keys),
    )
    # [blocks, batch, kv_heads, group, block, head_dim] → [batch, query, heads, head_dim]
    rows = jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, head_dim)[:, :, :length].swapaxes(1, 2)
    if sinks is not None:  # which is what sees no key
        return rows
    seen = jnp.moveaxis(seen, 0, 1).reshape(batch, -1)[:, :length, None, None]
    # A query that sees no key takes the mean of all values, as under a softmax of equal logits.
    mean = jnp.repeat(value.mean(axis=1, keepdims=True), heads // kv_heads, axis=2)
    return jnp.where(seen, rows, mean)


def _lines(table: Array, size: int, blocks: int) -> Array:
    """The bias of a row's offsets by how far two blocks are apart [2·blocks − 1, heads, 2·size].

    Of each it has the offsets k − q in order, as :func:`band` reads them.
    """
    length = size * blocks
    line = bias_of_offsets(table, jnp.arange(length - 1, -length - 1, -1, dtype=jnp.int32))
    pieces = cut(line, 1, size)
    return jnp.concatenate([pieces[:-1], pieces[1:]], axis=2)


def _line(lines: Array, i: Array, j: Array) -> Array:
    """Which line blocks i of the queries and j of the keys read."""
    return len(lines) // 2 + j - i


def _by_distance(
    setting: _Setting,
    run: Callable[[_Bias | None], Any],
    bias: Array | None,
    block: Pattern,
    visit: Visits,
    i: Array,
    j: Array,
) -> Any:
    """``run`` with the bias of blocks i of the queries and j of the keys, by the formula that suits them.

    All of the block's work is in the branch, so that compilers fuse the bias into it.
    """
    if bias is None:
        return run(None)
    batch, size = block.query_positions.shape
    if setting.banded:
        heads = bias.shape[1]
        in_rows = lambda line: jnp.broadcast_to(band(line), (batch, heads, size, size))
        # By their numbers: XLA would not vectorise what reads by an index that it looks up.
        return run(_Bias(in_rows, bias[_line(bias, i, j)]))
    at = {"query_positions": block.query_positions, "key_positions": block.key_positions}
    far, near = functools.partial(few_buckets, rank=visit.rank[j], **at), functools.partial(all_buckets, **at)
    return lax.cond(visit.few[j], lambda: run(_Bias(far, bias)), lambda: run(_Bias(near, bias)))


def _scores(setting: _Setting, query: Array, key: Array) -> tuple[Array, Array | float]:
    """A block's logits [batch, heads, query, key] before bias and mask, and the soft cap's derivative."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = setting.scale * jnp.einsum("bkgqd,bksd->bkgqs", query, key, preferred_element_type=dtype)
    return soft_capped(_heads_as_one(logits), setting.soft_cap)


def _heads_as_one(x: Array) -> Array:
    """[batch, kv_heads, group, …] → [batch, heads, …]: split in two, a TPU would not fuse a bias into it."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _forward(
    setting: _Setting,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    sinks: Array | None,
    sides: Sides,
) -> tuple[Array, Array, Array]:
    """The attended values, whether a query sees a key at all, and lse; by blocks of queries."""
    of_queries, of_keys, window = sides
    visits = find_visits(*sides, causal=setting.causal)
    dtype, shape = jnp.promote_types(query.dtype, jnp.float32), query.shape[1:]
    per_row, lowest = _heads_as_one(jnp.zeros(shape[:-1], dtype)), jnp.finfo(dtype).min

    def per_block(_: None, x: tuple[Array, Array, Tokens, Visits]) -> tuple[None, tuple[Array, ...]]:
        i, q, queries, visit = x

        def step(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            k, v, keys = jax.tree.map(lambda x: x[j], (key, value, of_keys))
            block = block_pattern(queries, keys, window, causal=setting.causal)

            def run(own: _Bias | None) -> tuple[Array, ...]:
                peak, mass, total = state
                (scores, _), mask = _scores(setting, q, k), block.mask()
                scores = scores if own is None else scores + own.of(own.read)
                scores = jnp.where(mask, scores, lowest)
                above = jnp.maximum(peak, scores.max(axis=-1))
                rescale = jnp.exp(peak - above)
                p = jnp.where(mask, jnp.exp(scores - above[..., None]), 0)
                grouped = p.astype(v.dtype).reshape(*shape[:-1], -1)
                weighted = jnp.einsum("bkgqs,bksd->bkgqd", grouped, v, preferred_element_type=dtype)
                total = total * rescale.reshape(*shape[:-1], 1) + weighted
                return above, mass * rescale + p.sum(axis=-1), total

            return _by_distance(setting, run, bias, block, visit, i, j)

        start = (lowest, 0) if sinks is None else (sinks[:, None], 1)
        state = *(jnp.broadcast_to(x, per_row.shape).astype(dtype) for x in start), jnp.zeros(shape, dtype)
        peak, mass, total = lax.fori_loop(visit.first, visit.end, step, state)
        seen = mass != 0  # NaN is seen: a mean in its place would hide it
        mass = jnp.where(seen, mass, 1)
        out = total / mass.reshape(*shape[:-1], 1)
        return None, (out.astype(query.dtype), seen[:, 0], peak + jnp.log(mass))

    _, (out, seen, lse) = lax.scan(per_block, None, (jnp.arange(len(query)), query, of_queries, visits))
    return out, seen, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    setting: _Setting,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    sinks: Array | None,
    sides: Sides,
) -> tuple[Array, Array]:
    """The attended values, and whether a query sees a key at all; all arrays are cut into blocks."""
    return _forward(setting, query, key, value, bias, sinks, sides)[:2]


def _keep(setting: _Setting, *arguments: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, seen, lse = map(named_output, _forward(setting, *arguments))
    return (out, seen), (*arguments, out, lse)


def _backward(setting: _Setting, kept: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    query, key, value, bias, sinks, sides, out, lse = kept
    of_queries, of_keys, window = sides
    visits = find_visits(*sides, causal=setting.causal)
    dtype, shape = jnp.promote_types(query.dtype, jnp.float32), query.shape[1:]
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def per_block(sums: tuple[Any, ...], x: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        i, q, g, out, lse, queries, visit = x
        delta = _heads_as_one((g.astype(dtype) * out.astype(dtype)).sum(axis=-1))

        def step(j: Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
            k, v, keys = jax.tree.map(lambda x: x[j], (key, value, of_keys))
            block = block_pattern(queries, keys, window, causal=setting.causal)

            def run(own: _Bias | None) -> tuple[Any, ...]:
                capped, slope = _scores(setting, q, k)
                added, pull = (0, None) if own is None else jax.vjp(*own)
                p = jnp.where(block.mask(), jnp.exp(capped + added - lse[..., None]), 0)
                dp = _heads_as_one(product("bkgqd,bksd->bkgqs", g, v))
                ds = p * (dp - delta[..., None])
                dbias = None if pull is None else pull(ds)[0]
                p = p.astype(g.dtype).reshape(*shape[:-1], -1)
                ds = (setting.scale * slope * ds).astype(k.dtype).reshape(p.shape)
                dq, dk = product("bkgqs,bksd->bkgqd", ds, k), product("bkgqs,bkgqd->bksd", ds, q)
                return dq, dk, product("bkgqs,bkgqd->bksd", p, g), dbias

            dq, dk, dv, dbias = _by_distance(setting, run, bias, block, visit, i, j)
            dqs, dks, dvs, dbiases = sums
            if dbiases is not None:
                dbiases = dbiases.at[_line(dbiases, i, j)].add(dbias) if setting.banded else dbiases + dbias
            return dqs + dq, dks.at[j].add(dk), dvs.at[j].add(dv), dbiases

        dq, *sums = lax.fori_loop(visit.first, visit.end, step, (jnp.zeros(shape, dtype), *sums))
        dsinks = None if sinks is None else -(jnp.exp(sinks[:, None] - lse) * delta).sum(axis=(0, 2))
        return tuple(sums), (dq.astype(query.dtype), dsinks)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), (key, value, bias))
    blocks = jnp.arange(len(query)), query, cotangents[0], out, lse, of_queries, visits
    (dk, dv, dbias), (dq, dsinks) = lax.scan(per_block, zeros, blocks)
    dsinks = None if dsinks is None else dsinks.sum(axis=0)
    return dq, dk.astype(key.dtype), dv.astype(value.dtype), dbias, dsinks, None


_attend.defvjp(_keep, _backward)
