"""Text generation with a KV cache: one compiled program for the prompt and all the tokens that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.errors import ConfigError, DataError, NonFiniteError

# Prompt lengths and token budgets are rounded up to a multiple of this, so that few shapes are compiled.
BUCKET = 64
# Below this temperature the softmax of float32 logits is their argmax, and the division would overflow.
_GREEDY = 1e-30


def filter_logits(
    logits: Float[Array, "batch vocab"],
    *,
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Float[Array, "batch vocab"]:
    """Sets to −∞ what sampling must not choose.

    top_k keeps the k largest logits; of those, top_p keeps the smallest set of the most probable tokens whose
    probability reaches p, and at least one; all of them at 1. Ties with the last kept token are kept.

    Args:
        logits: scores, already divided by the temperature.
        top_k: how many to keep, >= 1; None: all.
        top_p: the probability to keep, in (0, 1]; None: all.

    Returns:
        The filtered logits.

    Source:
        Fan et al., arXiv:1805.04833 §5.4 (top-k); Holtzman et al., arXiv:1904.09751 §3.1 (nucleus).

    Example:
        >>> filter_logits(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_p=jnp.float32(0.6))[0, 2].item()
        -inf
    """
    if top_k is None and top_p is None:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    keep = jnp.ones(descending.shape, bool)
    if top_k is not None:
        keep = keep & (jnp.arange(descending.shape[-1]) < top_k)
    if top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(keep, descending, -jnp.inf), axis=-1)
        above = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The sum of a large vocabulary rounds to 1 before its end, and a p may be too small for a device.
        is_first = jnp.arange(descending.shape[-1]) == 0
        keep = keep & ((above < top_p) | is_first | (top_p >= 1))
    smallest = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def generate(
    decode: Callable[..., tuple[Float[Array, "batch vocab"], Any]],
    init_cache: Callable[[int, int], Any],
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    rng: Array | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts of different lengths.

    The prompts are padded on the left to a multiple of 64 and the program is compiled once per bucket: other
    prompts, lengths, token budgets, temperatures, k, p and weights of the same shapes do not compile again.

    Args:
        decode: ``decode(variables, input_ids, position_ids=, key_valid=, cache=)`` gives (logits after the
            last token, cache); static, so hash it by value or keep one object.
        init_cache: ``init_cache(batch, slots)`` gives an empty cache.
        variables: the collections of the model; the column scales of adapters already resolved.
        prompts: token ids, one non-empty list per prompt.
        max_new_tokens: tokens to add at most, >= 1.
        temperature: the logits are divided by it; 0, or anything below 1e-30, takes the most likely token.
        top_k: sample among the k most likely.
        top_p: sample among the most likely that together have probability p.
        eos_token_id: token or tokens that end a row.
        rng: a ``jax.random`` key, needed when temperature > 0.

    Returns:
        The new tokens of every prompt, with the end token if one came.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there is no prompt, or an empty one.
        NonFiniteError: a logit is NaN or infinite; generation ends there.
    """
    check_settings(prompts, max_new_tokens, temperature, top_k, top_p, rng)
    lengths = np.array([len(prompt) for prompt in prompts])
    input_ids = pad_left(prompts)
    padded, budget = input_ids.shape[1], _bucket(max_new_tokens)
    greedy = is_greedy(temperature)
    tokens, count, finite, _ = _generate(
        decode,
        variables,
        init_cache(len(prompts), padded + budget),
        input_ids,
        lengths.astype(np.int32),
        np.zeros(budget, np.int32),
        np.int32(max_new_tokens),
        None if greedy else np.float32(temperature),
        None if greedy or top_k is None else np.int32(min(top_k, np.iinfo(np.int32).max)),
        None if greedy or top_p is None else np.float32(top_p),
        np.atleast_1d(np.array([] if eos_token_id is None else eos_token_id, np.int32)),
        None if greedy else rng,
    )
    count = np.asarray(count)
    if not np.all(finite):
        row = int(np.argmin(finite))
        raise not_finite(f"at new token {count[row]} of prompt {row + 1}")
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens), count, strict=True)]


def not_finite(where: str) -> NonFiniteError:
    """The error for logits that are NaN or infinite."""
    return NonFiniteError(
        "The logits of a model must be finite.",
        f"NaN or infinite ones {where}",
        "Compute in float32; if it stays, the weights or the adapter are damaged.",
    )


@partial(jax.jit, static_argnames="decode", donate_argnames="cache")
def _generate(
    decode: Callable[..., tuple[Float[Array, "batch vocab"], Any]],
    variables: Mapping[str, Any],
    cache: Any,
    input_ids: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    budget: Int[Array, " budget"],
    max_new_tokens: Int[Array, ""],
    temperature: Float[Array, ""] | None,
    top_k: Int[Array, ""] | None,
    top_p: Float[Array, ""] | None,
    eos: Int[Array, " eos"],
    rng: Array | None,
) -> tuple[Int[Array, "batch budget"], Int[Array, " batch"], Bool[Array, " batch"], Any]:
    """The prompt in one pass, then a token per turn until every row has ended or one is not finite.

    Gives tokens, their counts, whether the last logits of each row were finite, and the cache. That is an
    output so that its buffers can be donated: the loop writes into them, and none is copied.
    """

    def choose(logits: Float[Array, "batch vocab"], step: Int[Array, ""]) -> Int[Array, " batch"]:
        if temperature is None or rng is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        kept = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
        return jax.random.categorical(jax.random.fold_in(rng, step), kept).astype(jnp.int32)

    def put(tokens: Array, count: Array, ended: Bool[Array, " batch"], logits: Array, step: Array) -> tuple:
        token = choose(logits, step)
        finite = ended | jnp.all(jnp.isfinite(logits), axis=-1)
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        count = count + ~ended
        return tokens, count, ended | jnp.any(token[:, None] == eos, axis=-1), finite

    def unfinished(state: tuple) -> Bool[Array, ""]:
        step, _, _, ended, finite, _ = state
        return (step < max_new_tokens) & ~jnp.all(ended) & jnp.all(finite)

    def turn(state: tuple) -> tuple:
        step, tokens, count, ended, _, cache = state
        last = lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
        logits, cache = decode(variables, last, position_ids=(lengths + step - 1)[:, None], cache=cache)
        return step + 1, *put(tokens, count, ended, logits, step), cache

    slots = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
    positions = slots - (input_ids.shape[1] - lengths[:, None])
    logits, cache = decode(
        variables, input_ids, position_ids=jnp.maximum(positions, 0), key_valid=positions >= 0, cache=cache
    )
    batch = input_ids.shape[0]
    empty = jnp.zeros((batch, budget.shape[0]), jnp.int32)
    zero = jnp.int32(0)
    first = put(empty, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), logits, zero)
    _, tokens, count, _, finite, cache = lax.while_loop(unfinished, turn, (jnp.int32(1), *first, cache))
    return tokens, count, finite, cache


def pad_left(rows: Sequence[Sequence[int]], *, bucket: bool = True) -> Int[np.ndarray, "batch width"]:
    """Rows of different lengths as one array, filled with zeros in front.

    Args:
        rows: integers.
        bucket: round the width up to a multiple of ``BUCKET``.

    Returns:
        int32 rows.
    """
    width = max(len(row) for row in rows)
    padded = np.zeros((len(rows), _bucket(width) if bucket else width), np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[padded.shape[1] - len(row) :] = row
    return padded


def is_greedy(temperature: float) -> bool:
    """Whether sampling at this temperature is taking the most likely token."""
    return temperature < _GREEDY


def _bucket(length: int) -> int:
    """The smallest multiple of BUCKET that holds ``length``."""
    return -(-int(length) // BUCKET) * BUCKET


def check_settings(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: Array | None,
) -> None:
    """Raises on settings that cannot be meant."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise DataError(
            "Every prompt needs at least one token.",
            f"lengths {[len(prompt) for prompt in prompts]}",
            "Begin an empty text with the tokenizer's begin-of-text token.",
        )
    for wrong, rule, received in (
        (not max_new_tokens >= 1, "max_new_tokens must be at least 1.", max_new_tokens),
        (
            not 0 <= temperature < float("inf"),
            "temperature must be 0 (greedy) or a positive number.",
            temperature,
        ),
        (top_k is not None and not top_k >= 1, "top_k must be at least 1.", top_k),
        (top_p is not None and not 0 < top_p <= 1, "top_p must be in (0, 1].", top_p),
    ):
        if wrong:
            raise ConfigError(rule, received, "Choose a value in this range; None turns top_k and top_p off.")
    if temperature > 0 and rng is None:
        raise ConfigError("Sampling needs a random key.", "rng=None", "Pass rng=jax.random.key(seed).")
