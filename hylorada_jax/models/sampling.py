"""How the next token is chosen from the logits."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models.ids import INT32
from hylorada_jax.text import shown

# Below this temperature the softmax of float32 logits is their argmax, and the division would overflow.
_GREEDY = 1e-30


class Sampling(NamedTuple):
    """The settings of :func:`sampling` as scalars: other values compile nothing anew. None is off."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    rng: Array | None

    def adjust(
        self, logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"] | None
    ) -> Float[Array, "batch vocab"]:
        """Logits as they are sampled from, in transformers' order: penalty, temperature, filters.

        Args:
            logits: the model's.
            seen: the tokens of the prompt and those that were chosen; None where nothing is penalised.
        """
        if self.repetition_penalty is not None and seen is not None:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature is None:
            return logits
        return filter_logits(logits / self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    def choose(
        self,
        logits: Float[Array, "batch vocab"],
        seen: Bool[Array, "batch vocab"] | None,
        step: Int[Array, ""],
    ) -> Int[Array, " batch"]:
        """The next token of each row; its randomness depends on the key, the row and the step alone."""
        adjusted = self.adjust(logits, seen)
        if self.temperature is None or self.rng is None:
            return jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(self.rng, step), adjusted).astype(jnp.int32)


def sampling(
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    rng: Array | None = None,
) -> Sampling:
    """Settings that were checked, as scalars; what has no effect is left out.

    Args:
        temperature, top_k, top_p, min_p, repetition_penalty, rng: as in
            :func:`hylorada_jax.models.generate.generate`.
    """
    penalty = None if repetition_penalty in (None, 1) else np.float32(repetition_penalty)
    if temperature < _GREEDY:
        return Sampling(None, None, None, None, penalty, None)
    return Sampling(
        np.float32(temperature),
        None if not top_k else np.int32(min(top_k, np.iinfo(np.int32).max)),
        None if top_p is None else np.float32(top_p),
        None if not min_p else np.float32(min_p),
        penalty,
        rng,
    )


def penalise(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Makes tokens that were there already less likely: z / penalty where z > 0, else z · penalty.

    Args:
        logits: the model's.
        seen: which tokens were there.
        penalty: above 1 to discourage them, below 1 to encourage.

    Returns:
        The logits.

    Source:
        Keskar et al., arXiv:1909.05858 §4.1; for negative logits as transformers.

    Example:
        >>> penalise(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), jnp.float32(2)).tolist()
        [[1.0, -4.0, 2.0]]
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Float[Array, "batch vocab"],
    *,
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
    min_p: Float[Array, ""] | None = None,
) -> Float[Array, "batch vocab"]:
    """Sets to −∞ what sampling must not choose.

    top_k keeps the k largest logits; of those, top_p keeps the smallest set of the most probable tokens whose
    probability reaches p, and at least one; all of them at 1. min_p keeps what is at least min_p times as
    probable as the most probable token. Ties with the last kept token are kept.

    Args:
        logits: scores, already divided by the temperature.
        top_k: how many to keep, >= 1; None: all.
        top_p: the probability to keep, in (0, 1]; None: all.
        min_p: a share of the largest probability, in (0, 1]; None: all.

    Returns:
        The filtered logits.

    Source:
        Fan et al., arXiv:1805.04833 §5.4 (top-k); Holtzman et al., arXiv:1904.09751 §3.1 (nucleus);
        Nguyen et al., arXiv:2407.01082 §3 (min-p).

    Example:
        >>> filter_logits(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_p=jnp.float32(0.6))[0, 2].item()
        -inf
    """
    if min_p is not None:  # a ratio of probabilities, which the other filters do not change
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        return jnp.where(logits < least, -jnp.inf, filter_logits(logits, top_k=top_k, top_p=top_p))
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


def check_settings(
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    rng: Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> None:
    """Raises on settings that cannot be meant."""
    if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
        raise DataError(
            "Every prompt needs at least one token.",
            f"lengths {[len(prompt) for prompt in prompts]}",
            "Begin an empty text with the tokenizer's begin-of-text token.",
        )
    optional = {"top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {"temperature": temperature, **given}.items():
        if not _is_number(value):
            raise ConfigError(f"{name} must be a number.", shown(value), "Give one.")
    infinity = float("inf")
    for wrong, rule, received in (
        (
            not (isinstance(max_new_tokens, int | np.integer) and 1 <= max_new_tokens < INT32),
            "max_new_tokens must be an integer, at least 1 and below 2³¹.",
            max_new_tokens,
        ),
        (
            not 0 <= temperature < infinity,
            "temperature must be 0 (greedy) or a positive number.",
            temperature,
        ),
        (
            not (top_k is None or (isinstance(top_k, int | np.integer) and top_k >= 0)),
            "top_k must be an integer, at least 1, or 0 for all.",
            top_k,
        ),
        (top_p is not None and not 0 < top_p <= 1, "top_p must be in (0, 1].", top_p),
        (min_p is not None and not 0 <= min_p <= 1, "min_p must be in [0, 1].", min_p),
        (
            repetition_penalty is not None and not 0 < repetition_penalty < infinity,
            "repetition_penalty must be a positive number.",
            repetition_penalty,
        ),
    ):
        if wrong:
            raise ConfigError(rule, received, "Choose a value in this range.")
    # One that no model has, such as −1, ends nothing.
    ends = [] if eos_token_id is None else eos_token_id if np.iterable(eos_token_id) else [eos_token_id]
    for end in ends:
        if not _is_int32(end):
            rule = "eos_token_id must be a token's id, or a list of them."
            raise ConfigError(rule, shown(end), "Give tokenizer.end_token_ids, or () for none.")
    if temperature > 0 and rng is None:
        raise ConfigError("Sampling needs a random key.", "rng=None", "Pass rng=jax.random.key(seed).")


def _is_number(value: object) -> bool:
    # An array of one number is one as well, of numpy or of a device.
    return isinstance(value, int | float | np.number) or getattr(value, "ndim", None) == 0


def _is_int32(value: Any) -> bool:
    try:
        return -INT32 <= operator.index(value) < INT32
    except TypeError:
        return False
