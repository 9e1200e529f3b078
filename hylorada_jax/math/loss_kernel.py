"""A TPU kernel for the loss: the softmax over a vocabulary as attention, whose keys and values are the head.

    lse_t = log Σ_v exp S_tv,   mean_t = Σ_v softmax(S_t)_v S'_tv W_v,   S_t = W h_t, or with a soft cap

They are all that the loss and its gradient by h need but for the target's own row of W. No logits leave fast
memory, and a chunk of tokens reads the head once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hylorada_jax.math.kernel_rows import divided_over, product, tpu_kind
from hylorada_jax.math.soft_cap import soft_capped
from hylorada_jax.placement.axes import TENSOR

# All that a chunk of ``hylorada_jax.math.loss.kernel_tokens`` takes; TPUs since v5 have 64 MiB or more.
_FAST_MEMORY = 56 * 2**20
_HIDDEN = -1e30


def over_vocabulary(
    hidden: Float[Array, "groups tokens d"],
    head: Float[Array, "vocab d"],
    soft_cap: float | None,
    *,
    with_mean: bool,
) -> tuple[Float[Array, "groups tokens"], Float[Array, "groups tokens d"] | None]:
    """lse of every token and, where it is asked for, mean, in float32.

    On a mesh every device computes its own groups; where ``tensor`` divides the vocabulary, each its part.

    Args:
        hidden: a chunk of hidden states: a multiple of 128 tokens.
        head: output embedding, in their dtype.
        soft_cap: bound of the logits; None: none.
        with_mean: what the gradient needs, for one product more.
    """
    run = functools.partial(_on_a_device, soft_cap=soft_cap, with_mean=with_mean)
    if (axes := divided_over(len(hidden))) is None:
        return run(hidden, head)
    rows, tensor = axes
    parts = TENSOR if tensor > 1 and len(head) % tensor == 0 else None

    def of_part(hidden: Array, head: Array) -> tuple[Array, Array | None]:
        lse, mean = run(hidden, head)
        if parts is None:
            return lse, mean
        share = jnp.exp(lse - (top := jax.lax.pmax(lse, parts)))
        total = jax.lax.psum(share, parts)
        if mean is not None:
            mean = jax.lax.psum(mean * (share / total)[..., None], parts)
        return top + jnp.log(total), mean

    own = PartitionSpec(rows)
    specs: dict[str, Any] = {"in_specs": (own, PartitionSpec(parts)), "out_specs": (own, own)}
    return jax.shard_map(of_part, **specs, check_vma=False)(hidden, head)


def _on_a_device(
    hidden: Array, head: Array, *, soft_cap: float | None, with_mean: bool
) -> tuple[Array, Array | None]:
    groups, tokens, width = hidden.shape
    vocab, block = len(head), min(512, tokens // 2)
    outputs = [jax.ShapeDtypeStruct((groups, 1, tokens), jnp.float32)]
    out_specs = [pl.BlockSpec((None, 1, tokens), lambda group, j: (group, 0, 0))]
    chunk = pl.BlockSpec((None, tokens, width), lambda group, j: (group, 0, 0))
    sums = [(1, tokens), (1, tokens)]
    if with_mean:
        outputs.append(jax.ShapeDtypeStruct(hidden.shape, jnp.float32))
        out_specs.append(chunk)
        sums.append((width, tokens))
    moved = hidden.nbytes + groups * head.nbytes + sum(4 * out.size for out in outputs)
    lse, *mean = pl.pallas_call(
        functools.partial(_kernel, vocab, soft_cap, len(outputs)),
        grid=(groups, -(-vocab // block)),
        in_specs=[chunk, pl.BlockSpec((block, width), lambda group, j: (j, 0))],
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_FAST_MEMORY
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(outputs) * groups * tokens * vocab * width,
            transcendentals=groups * tokens * vocab,
            bytes_accessed=moved,
        ),
        interpret=tpu_kind() is None,
    )(hidden, head)
    return lse[:, 0], mean[0] if mean else None


def _kernel(vocab: int, soft_cap: float | None, outputs: int, hidden: Any, head: Any, *parts: Any) -> None:
    """A block of the vocabulary [block, d] with all tokens: what belongs to a token is a column."""
    (lse, *mean), (top, total, *weighted) = parts[:outputs], parts[outputs:]
    block, j = len(head), pl.program_id(1)

    @pl.when(j == 0)
    def start() -> None:
        top[...] = jnp.full_like(top, _HIDDEN)
        for numbers in (total, *weighted):
            numbers[...] = jnp.zeros_like(numbers)

    words: Array = head[...]
    if part := vocab % block:  # what the last block has beyond may be anything, NaN too
        number = j * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        words = jnp.where(number < vocab, words, 0)
    scores, slope = soft_capped(product(words, hidden[...], (1, 1)), soft_cap)
    if part:
        scores = jnp.where(number < vocab, scores, _HIDDEN)
    highest = jnp.maximum(top[...], scores.max(axis=0, keepdims=True))
    weights, kept = jnp.exp(scores - highest), jnp.exp(top[...] - highest)
    top[...] = highest
    total[...] = kept * total[...] + weights.sum(axis=0, keepdims=True)
    for numbers in weighted:
        numbers[...] = kept * numbers[...] + product(words, (weights * slope).astype(words.dtype), (0, 0))

    @pl.when(j == pl.num_programs(1) - 1)
    def end() -> None:
        lse[...] = top[...] + jnp.log(total[...])
        for output, numbers in zip(mean, weighted, strict=True):
            output[...] = (numbers[...] / total[...]).T
