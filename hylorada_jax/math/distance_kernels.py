"""TPU kernels of attention with a bias by distance, and of its gradients.

The bias of a block of queries and keys is one stretch of the bias by distance, moved on by one from key to
key: a kernel rolls the stretch, and adds its gradient up along the same diagonals. What distance hides,
causality and a window, is a bias too. So a kernel knows no buckets, and costs the same wherever a block is.

All blocks are [keys, queries]: what belongs to a query is a row, and sums over keys go down the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from hylorada_jax.math.kernel_grid import Block, Grid, Settings, Step
from hylorada_jax.math.kernel_rows import product
from hylorada_jax.math.remat import named_output
from hylorada_jax.math.soft_cap import soft_capped

# Of what is not seen; finite, so that a row that has seen nothing yet is no NaN.
HIDDEN = -0.7 * float(np.finfo(np.float32).max)
# Rows that a TPU keeps in one register.
SUBLANES = 8

Refs = Sequence[Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attended(
    settings: Settings,
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    value: Float[Array, "batch kv_heads seq head_dim"],
    segments: Int[Array, "batch seq"] | None,
    bias: Float[Array, "heads distance"],
    sinks: Float[Array, " heads"] | None,
    window: Int[Array, ""],
) -> Float[Array, "batch heads seq head_dim"]:
    """softmax(q kᵀ + bias[q − k] within a segment) v, for rows of whole blocks.

    Args:
        settings: see the class.
        query: queries, already multiplied by the scale of the logits.
        key: keys.
        value: values.
        segments: a token sees those of its own.
        bias: of the distances from −origin to seq − 1; ``HIDDEN`` where a distance is not seen.
        sinks: a logit per head that has no value; None: none.
        window: distances from here on are not seen: blocks that are farther are passed over.
    """
    return _forward(settings, query, key, value, segments, bias, sinks, window)[0]


def _forward(
    settings: Settings,
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    bias: Array,
    sinks: Array | None,
    window: Array,
) -> tuple[Array, tuple[Any, ...]]:
    grid = Grid(settings, query.shape, key.shape[1], by_query=True)
    size, dim = settings.size, query.shape[3]
    numbers = jax.ShapeDtypeStruct((*query.shape[:2], 1, query.shape[2]), jnp.float32)
    out, lse = grid.run(
        functools.partial(_attend, settings),
        _inputs(grid, query, key, value, bias, segments),
        [(query, grid.query), (numbers, grid.number)],
        [(1, size), (1, size), (dim, size)],
        segments=segments,
        window=window,
        products=2,
    )
    if sinks is not None:
        # The kernels of the backward pass read what a sink changes, lse and Σ g·out, and nothing else of it.
        both = jnp.logaddexp(lse, sinks[:, None, None])
        out = (out * jnp.exp(lse - both).swapaxes(2, 3)).astype(out.dtype)
        lse = both
    out, lse = named_output(out), named_output(lse)
    return out, (query, key, value, segments, bias, sinks, window, out, lse)


def _backward(settings: Settings, residuals: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    query, key, value, segments, bias, sinks, window, out, lse = residuals
    # Σ_k of a weight times its gradient, for every query.
    mean = jnp.einsum("bhqd,bhqd->bhq", out, g, preferred_element_type=jnp.float32)[:, :, None]

    def run(kernel: Callable[..., None], grid: Grid, outputs: list[Any], *sums: Any, products: int) -> Any:
        given = [(g, grid.query), (lse, grid.number), (mean, grid.number)]
        inputs = _inputs(grid, query, key, value, bias, segments) + given
        kernel = functools.partial(kernel, settings)
        return grid.run(kernel, inputs, outputs, sums, segments=segments, window=window, products=products)

    size, dim = settings.size, query.shape[3]
    grid = Grid(settings, query.shape, key.shape[1], by_query=True)
    outputs: list[Any] = [(query, grid.query)]
    if settings.learned:
        diagonals = jax.ShapeDtypeStruct((bias.shape[0], SUBLANES, bias.shape[1]), jnp.float32)
        outputs += [(diagonals, Block((None, *diagonals.shape[1:]), lambda row, head, i, j: (head, 0, 0)))]
    d_query, *d_bias = run(_pull_query, grid, outputs, (dim, size), products=3)
    # Row r of the diagonals is r places too far on.
    of_bias = sum(jnp.roll(d[:, row], -row, axis=1) for d in d_bias for row in range(SUBLANES))

    grid = Grid(settings, query.shape, key.shape[1], by_query=False)
    outputs = [(key, grid.key), (value, grid.key)]
    d_key, d_value = run(_pull_key, grid, outputs, (size, dim), (size, dim), products=4)
    of_sinks = None if sinks is None else -(jnp.exp(sinks[:, None, None] - lse) * mean).sum(axis=(0, 2, 3))
    return d_query, d_key, d_value, None, jnp.zeros_like(bias) + of_bias, of_sinks, None


attended.defvjp(_forward, _backward)


def _inputs(
    grid: Grid, query: Array, key: Array, value: Array, bias: Array, segments: Array | None
) -> list[tuple[Array | None, Block]]:
    tensors = [(query, grid.query), (key, grid.key), (value, grid.key)]
    of_row = None if segments is None else segments[:, None]
    stretches = [(bias[:, None], grid.near), (bias[:, None], grid.far)]
    return [*tensors, *stretches, (of_row, grid.query_segments), (of_row, grid.key_segments)]


# The kernels take references to the inputs in the order of ``_inputs``; those that pull back, also to the
# gradient, to the logarithm of the sum of exponentials, and to the mean gradient of every query's weights.


def _attend(settings: Settings, step: Step, inputs: Refs, outputs: Refs, sums: Refs) -> None:
    out, lse = outputs
    top, total, weighted = sums
    value = inputs[2]

    @pl.when(step.first)
    def start() -> None:
        top[...] = jnp.full_like(top, HIDDEN)

    @pl.when(step.live)
    def add() -> None:
        logits, _ = _logits(settings, *inputs)
        highest = jnp.maximum(top[...], logits.max(axis=0, keepdims=True))
        weights = jnp.exp(logits - highest)
        kept = jnp.exp(top[...] - highest)
        top[...] = highest
        total[...] = kept * total[...] + weights.sum(axis=0, keepdims=True)
        weighted[...] = kept * weighted[...] + product(value[...], weights.astype(value.dtype), (0, 0))

    @pl.when(step.last)
    def end() -> None:
        out[...] = (weighted[...] / total[...]).T.astype(out.dtype)
        lse[...] = top[...] + jnp.log(total[...])


def _pull_query(settings: Settings, step: Step, inputs: Refs, outputs: Refs, sums: Refs) -> None:
    key, (total,) = inputs[1], sums
    d_query, *d_bias = outputs

    @pl.when(step.begins)
    def start() -> None:
        for diagonals in d_bias:
            diagonals[...] = jnp.zeros_like(diagonals)

    @pl.when(step.live)
    def add() -> None:
        _, of_bias, of_logits = _weights(settings, inputs)
        total[...] += product(key[...], of_logits.astype(key.dtype), (0, 0))
        for diagonals in d_bias:
            at = pl.multiple_of(step.stretch * settings.size, settings.size)
            diagonals[:, pl.ds(at, 2 * settings.size)] += _along_diagonals(of_bias)

    @pl.when(step.last)
    def end() -> None:
        d_query[...] = total[...].T.astype(d_query.dtype)


def _pull_key(settings: Settings, step: Step, inputs: Refs, outputs: Refs, sums: Refs) -> None:
    query, g = inputs[0], inputs[7]
    of_key, of_value = sums

    @pl.when(step.live)
    def add() -> None:
        weights, _, of_logits = _weights(settings, inputs)
        of_key[...] += product(of_logits.astype(query.dtype), query[...], (1, 0))
        of_value[...] += product(weights.astype(g.dtype), g[...], (1, 0))

    @pl.when(step.last)
    def end() -> None:
        for output, total in zip(outputs, sums, strict=True):
            output[...] = total[...].astype(output.dtype)


def _weights(settings: Settings, inputs: Refs) -> tuple[Array, Array, Array]:
    """The weights of a block, and the gradients of bias and logits (before the soft cap)."""
    *seen, g, lse, mean = inputs
    logits, slope = _logits(settings, *seen)
    weights = jnp.exp(logits - lse[...])
    of_bias = weights * (product(inputs[2][...], g[...], (1, 1)) - mean[...])
    return weights, of_bias, of_bias * slope


def _logits(
    settings: Settings, query: Any, key: Any, value: Any, near: Any, far: Any, own: Any, others: Any
) -> tuple[Array, Array | float]:
    """The logits of a block [keys, queries], and the soft cap's derivative."""
    del value
    logits, slope = soft_capped(product(key[...], query[...], (1, 1)), settings.soft_cap)
    # From the middle on: the distances of the first key. The next key's are greater by −1.
    stretch = jnp.concatenate([near[...], far[...]], axis=1)
    rolled = jnp.broadcast_to(stretch, (settings.size, stretch.shape[1]))
    rolled = pltpu.roll(rolled, 0, 1, stride=1, stride_axis=0)
    logits = logits + rolled[:, settings.size :]
    if own is not None:
        logits = jnp.where(own[...] == others[...].T, logits, HIDDEN)
    return logits, slope


def _along_diagonals(x: Array) -> Array:
    """Sums of a block over its diagonals: [8, 2·size], where row r is to be moved back by r."""
    size = x.shape[0]
    wide = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
    total = wide[:SUBLANES]
    for start in range(SUBLANES, size, SUBLANES):
        total = total + pltpu.roll(wide[start : start + SUBLANES], 2 * size - start, 1)
    return total
