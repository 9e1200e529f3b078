"""The settings of a generation config that forbid tokens, or force one, as transformers' torch models do.

The steps of its Flax models differ: a text that may end at min_length can end one token later only, of
several end tokens none is forbidden, and an n-gram may begin in the padding of a shorter prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.models.generation_config import Constraints


class Rows(NamedTuple):
    """What is there when a token is chosen.

    Attributes:
        tokens: the prompts, or the start tokens of a decoder, and behind them the new ones and room for more.
        there: which of them are tokens already, and no padding.
        given: [batch] how many of each row were there at first.
        new: the tokens that each row has got since.
        most: how many it will get.
    """

    tokens: Int[Array, "batch length"]
    there: Bool[Array, "batch length"]
    given: Int[np.ndarray, " batch"]
    new: Int[Array, ""]
    most: int


def constrain(
    rules: Constraints, ends: Sequence[int], rows: Rows, logits: Float[Array, "batch vocab"]
) -> Float[Array, "batch vocab"]:
    """Logits with −∞ for what must not be chosen; where a token is forced it has 0, and all others −∞.

    Each row's rules go by its own tokens, so that they do not depend on the prompts beside it.

    Args:
        rules: as in transformers; of ``min_length``, a prompt's tokens count, or a decoder's start token.
        ends: the tokens that end a text.
        rows: what is there.
        logits: the model's.

    Returns:
        The logits.

    Source:
        transformers 4.57, ``GenerationMixin._get_logits_processor`` and the classes that it names.
    """
    vocab, given, new = logits.shape[-1], jnp.asarray(rows.given)[:, None], rows.new
    length = given + new

    def among(tokens: Sequence[int]) -> Bool[np.ndarray, " vocab"]:
        return np.isin(np.arange(vocab), tokens)

    def without(logits: Array, tokens: Array | np.ndarray, when: Array | bool = True) -> Array:
        return jnp.where(tokens & when, -jnp.inf, logits)

    def forced(logits: Array, tokens: Sequence[int], when: Array) -> Array:
        return jnp.where(when, jnp.where(among(tokens), 0.0, -jnp.inf), logits)

    if size := rules.no_repeat_ngram_size:
        logits = without(logits, _completes_again(rows, size, vocab))
    if rules.min_length:
        logits = without(logits, among(ends), length < rules.min_length)
    if (first := rules.forced_bos_token_id) is not None:
        logits = forced(logits, [first], length == 1)
    if (last := rules.forced_eos_token_id) is not None:
        logits = forced(logits, last if isinstance(last, list) else [last], new == rows.most - 1)
    if rules.suppress_tokens:
        logits = without(logits, among(rules.suppress_tokens))
    if rules.begin_suppress_tokens:
        # Of the first token that is chosen; a forced one is none.
        begin = 0 if first is None else jnp.where(given == 1, 1, 0)
        logits = without(logits, among(rules.begin_suppress_tokens), new == begin)
    return logits


def _completes_again(rows: Rows, size: int, vocab: int) -> Bool[Array, "batch vocab"]:
    """The tokens with which the last ``size`` tokens would be the same as some before."""
    tokens, count = rows.tokens, rows.tokens.shape[1] - size + 1
    if count < 1:
        return jnp.zeros((len(tokens), vocab), bool)
    starts = jnp.arange(count)
    before = tokens[:, starts[:, None] + jnp.arange(size - 1)]  # [batch, count, size − 1]
    end = tokens.shape[1] - rows.most + rows.new
    last = lax.dynamic_slice_in_dim(tokens, end - (size - 1), size - 1, axis=1)
    # In a row that has fewer, nothing is there before.
    same = rows.there[:, :count] & rows.there[:, size - 1 :] & jnp.all(before == last[:, None], axis=-1)
    none = jnp.zeros((len(tokens), vocab), bool)
    return none.at[jnp.arange(len(tokens))[:, None], tokens[:, size - 1 :]].max(same)
