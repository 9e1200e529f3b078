"""Text generation with a KV cache: the prompt in one compiled program, and in another what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.errors import NonFiniteError
from hylorada_jax.models.sampling import Sampling, check_settings, sampling
from hylorada_jax.placement.processes import whole
from hylorada_jax.placement.shards import in_use

# Prompt lengths and token budgets are rounded up to a multiple of this at least: few shapes are compiled.
_BUCKET = 64
# Tokens that a stream computes at a time: few enough to be read as they come, and to stop soon.
_AT_ONCE = 4

Decode = Callable[..., tuple[Float[Array, "batch vocab"], Any]]


def generate(
    decode: Decode,
    init_cache: Callable[[int, int], Any],
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    rng: Array | None = None,
    holds: int | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts of different lengths.

    The prompts are padded on the left to 64, 128, 192, 256, 384, 512, 768 … tokens, and two programs are
    compiled for each, for the prompt and for what follows: other prompts, lengths, token budgets,
    temperatures, k, p and weights of the same shapes do not compile again.

    Args:
        decode: ``decode(variables, input_ids, position_ids=, key_valid=, cache=)`` gives (logits after the
            last token, cache); static, so hash it by value or keep one object. For the prompt it also gets
            ``empty=True``: the cache has no tokens yet.
        init_cache: ``init_cache(batch, slots)`` gives an empty cache.
        variables: the collections of the model; the column scales of adapters already resolved.
        prompts: token ids, one non-empty list per prompt.
        max_new_tokens: tokens to add at most, >= 1.
        temperature: the logits are divided by it; 0, or anything below 1e-30, takes the most likely token.
        top_k: sample among the k most likely.
        top_p: sample among the most likely that together have probability p.
        min_p: sample among those at least min_p times as probable as the most likely.
        repetition_penalty: see :func:`hylorada_jax.models.sampling.penalise`; at any temperature.
        eos_token_id: token or tokens that end a row.
        rng: a ``jax.random`` key, needed when temperature > 0.
        holds: tokens up to which what is cached holds (LongRoPE): where the longest row outgrows them, all
            rows are computed anew, once.

    Returns:
        The new tokens of every prompt, with the end token if one came.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there is no prompt, or an empty one.
        NonFiniteError: a logit is NaN or infinite; generation ends there.
    """
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    how |= {"repetition_penalty": repetition_penalty, "rng": rng}
    check_settings(prompts, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, **how)
    at_once, chosen = max_new_tokens, sampling(**how)
    rounds = _rounds(
        decode, init_cache, variables, prompts, max_new_tokens, at_once, eos_token_id, holds, chosen
    )
    *_, last = rounds
    return _rows(last)


def stream(
    decode: Decode,
    init_cache: Callable[[int, int], Any],
    variables: Mapping[str, Any],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    holds: int | None = None,
    **how: Any,
) -> Iterator[list[int]]:
    """The tokens that :func:`generate` gives for one prompt, as they come: one, then some at a time.

    Nothing is computed between two of them, so that who reads them can stop.

    Args:
        decode, init_cache, variables, max_new_tokens, eos_token_id, holds: as in :func:`generate`.
        prompt: token ids.
        **how: temperature, top_k, top_p, min_p, repetition_penalty, rng, as in :func:`generate`.

    Returns:
        An iterator of lists that are not empty.

    Raises:
        ConfigError, DataError: as in :func:`generate`, and here, not in the iterator.
    """
    check_settings([prompt], max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, **how)
    at_once, chosen = _AT_ONCE, sampling(**how)
    return _new(
        _rounds(decode, init_cache, variables, [prompt], max_new_tokens, at_once, eos_token_id, holds, chosen)
    )


def not_finite(where: str) -> NonFiniteError:
    """The error for logits that are NaN or infinite."""
    return NonFiniteError(
        "The logits of a model must be finite.",
        f"NaN or infinite ones {where}",
        "Compute in float32; if it stays, the weights or the adapter are damaged.",
    )


class _State(NamedTuple):
    """Generation under way.

    Donated from call to call, so that the cache is written into and never copied.

    Attributes:
        step: tokens that each row would have, had none ended.
        tokens: [batch, budget] the new ones.
        counts: [batch] how many of them are a row's own.
        ended: [batch] the row has had an end token.
        finite: [batch] the last logits of the row were.
        seen: [batch, vocab] tokens of the prompt and new ones; None where nothing is penalised.
        lengths: [batch] of the prompts.
        cache: the model's.
    """

    step: Array
    tokens: Array
    counts: Array
    ended: Array
    finite: Array
    seen: Array | None
    lengths: Array
    cache: Any


def _rounds(
    decode: Decode,
    init_cache: Callable[[int, int], Any],
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    at_once: int,
    eos_token_id: int | Sequence[int] | None,
    holds: int | None,
    chosen: Sampling,
) -> Iterator[_State]:
    """The state after the first token, and after each call that follows; to be read before the next."""
    lengths, budget = np.array([len(prompt) for prompt in prompts], np.int32), _bucket(max_new_tokens)
    ends = np.atleast_1d(np.array([] if eos_token_id is None else eos_token_id, np.int32))
    longest = int(lengths.max())
    # Where all is computed at once: at the start, and where what is cached then holds no longer.
    anew = {0} if holds is None or longest > holds else {0, holds + 1 - longest}
    state, step = _untouched(lengths, budget), 0
    while step < max_new_tokens:
        if step in anew:
            if step and not _goes_on(state):
                return
            new = whole(state.tokens)[:, :step]
            input_ids = pad_left([[*row, *more] for row, more in zip(prompts, new, strict=True)])
            for leaf in jax.tree.leaves(state.cache):  # its memory is wanted for the next
                leaf.delete()
            with in_use(variables):
                cache = init_cache(len(prompts), input_ids.shape[1] + budget)
                state = _begin(decode, variables, state._replace(cache=cache), input_ids, chosen, ends)
            step += 1
        else:
            until = min(step + at_once, max_new_tokens, *(each for each in anew if each > step))
            with in_use(variables):
                state = _go_on(decode, variables, state, np.int32(until), chosen, ends)
            step = until
        yield state


def _untouched(lengths: Any, budget: int) -> _State:
    """Before the first token, without a cache; of numpy's arrays, which lie on no device yet."""
    zeros: Callable[..., Any] = np.zeros
    batch = len(lengths)
    return _State(
        step=zeros((), np.int32),
        tokens=zeros((batch, budget), np.int32),
        counts=zeros(batch, np.int32),
        ended=zeros(batch, bool),
        finite=~zeros(batch, bool),
        seen=None,
        lengths=lengths,
        cache=None,
    )


def _goes_on(state: _State) -> bool:
    return not whole(state.ended).all() and bool(whole(state.finite).all())


def _rows(state: _State) -> list[list[int]]:
    """The new tokens so far."""
    count = whole(state.counts)
    if not np.all(finite := whole(state.finite)):
        row = int(np.argmin(finite))
        raise not_finite(f"at new token {count[row]} of prompt {row + 1}")
    return [row[:n].tolist() for row, n in zip(whole(state.tokens), count, strict=True)]


def _new(rounds: Iterator[_State]) -> Iterator[list[int]]:
    """What each round adds to the one row, until it has ended."""
    given = 0
    for state in rounds:
        (row,) = _rows(state)
        ended = bool(whole(state.ended)[0])
        yield row[given:]
        given = len(row)
        if ended:
            return


@partial(jax.jit, static_argnames="decode", donate_argnames="state")
def _begin(
    decode: Decode,
    variables: Mapping[str, Any],
    state: _State,
    input_ids: Int[Array, "batch width"],
    chosen: Sampling,
    ends: Int[Array, " ends"],
) -> _State:
    """All tokens so far, padded on the left, in one pass into an empty cache; and the next token."""
    batch, width = input_ids.shape
    positions = jnp.arange(width, dtype=jnp.int32) - (width - (state.lengths + state.step)[:, None])
    valid = positions >= 0
    logits, cache = decode(
        variables,
        input_ids,
        position_ids=jnp.maximum(positions, 0),
        key_valid=valid,
        cache=state.cache,
        empty=True,
    )
    seen = state.seen
    if seen is None and chosen.repetition_penalty is not None:
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], input_ids].max(valid)
    return _put(state._replace(cache=cache, seen=seen), logits, chosen, ends)


@partial(jax.jit, static_argnames="decode", donate_argnames="state")
def _go_on(
    decode: Decode,
    variables: Mapping[str, Any],
    state: _State,
    until: Int[Array, ""],
    chosen: Sampling,
    ends: Int[Array, " ends"],
) -> _State:
    """A token per turn, until there are so many, every row has ended, or one is not finite."""

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.ended) & jnp.all(state.finite)

    def turn(state: _State) -> _State:
        last = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        positions = (state.lengths + state.step - 1)[:, None]
        logits, cache = decode(variables, last, position_ids=positions, cache=state.cache)
        return _put(state._replace(cache=cache), logits, chosen, ends)

    return lax.while_loop(unfinished, turn, state)


def _put(
    state: _State, logits: Float[Array, "batch vocab"], chosen: Sampling, ends: Int[Array, " ends"]
) -> _State:
    """The state with one more token."""
    token = chosen.choose(logits, state.seen, state.step)
    return state._replace(
        step=state.step + 1,
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        counts=state.counts + ~state.ended,
        ended=state.ended | jnp.any(token[:, None] == ends, axis=-1),
        finite=state.ended | jnp.all(jnp.isfinite(logits), axis=-1),
        seen=None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True),
    )


def pad_left(
    rows: Sequence[Sequence[int]], *, bucket: bool = True, filling: int = 0
) -> Int[np.ndarray, "batch width"]:
    """Rows of different lengths as one array, filled in front.

    Args:
        rows: integers.
        bucket: round the width up to one of few.
        filling: what is in front.

    Returns:
        int32 rows.
    """
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), _bucket(width) if bucket else width), filling, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[padded.shape[1] - len(row) :] = row
    return padded


def _bucket(length: int) -> int:
    """A length of few: the next multiple of _BUCKET, or of a quarter of the next power of two.

    A conversation that grows so compiles twice while it doubles, and computes at most half too much.
    """
    step = max(_BUCKET, (1 << (int(length) - 1).bit_length()) // 4)
    return -(-int(length) // step) * step
