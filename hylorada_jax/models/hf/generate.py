"""Hugging Face's own generation, with the settings and the errors of our decoder's."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool
from transformers import FlaxPreTrainedModel

from hylorada_jax.models.base_model import BaseModel, check_room
from hylorada_jax.models.generate import not_finite, pad_left
from hylorada_jax.models.generation_config import Constraints, constraints
from hylorada_jax.models.hf.constrain import Rows, constrain
from hylorada_jax.models.sampling import Sampling, check_settings, sampling


def generate(
    base: BaseModel,
    model: FlaxPreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] = (),
    **how: Any,
) -> list[list[int]]:
    """The new tokens of every prompt, with the end token if one came.

    Args:
        base: which knows how long its rows may be.
        model: of it, which generates; it may be bound to adapters.
        prompts: token ids; what the encoder reads, if there is one.
        max_new_tokens, eos_token_id, **how: as for ``hylorada_jax.models.generate.generate``.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there is no prompt, an empty one, or no room in the table of positions.
        ModelError: a constraint of the generation config is of another type, or out of bounds.
        NonFiniteError: a logit is NaN or infinite.
    """
    check_settings(prompts, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, **how)
    check_room(base, prompts, max_new_tokens)
    rules = constraints(own_constraints(model), model.config.vocab_size, base.name)
    ends = tuple(np.atleast_1d(eos_token_id).tolist())
    ids = pad_left(prompts, bucket=False)
    mask = pad_left([[1] * len(prompt) for prompt in prompts], bucket=False)
    given = mask > 0
    if base.is_encoder_decoder:
        # An encoder may count positions from the first column; the answer begins with one start token.
        ids, mask = (
            np.stack([np.roll(r, sum(m)) for r, m in zip(x, mask, strict=True)]) for x in (ids, mask)
        )
        given = np.ones((len(prompts), 1), bool)
    width = given.shape[1]
    chosen = sampling(**how)
    # Its own filters, of which one is on by default, are off: ours come before them.
    off = {} if chosen.temperature is None else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    mark = model.config.vocab_size  # beyond the last token
    sequences = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=chosen.temperature is not None,
        num_beams=1,  # whatever the config says: each token is chosen by itself
        logits_processor=[_processor(chosen, rules, ends, given, max_new_tokens)],
        # Hugging Face stops at one token, and for None at the config's. For several, as for none, it gets
        # one that never comes, and the rows are cut below.
        eos_token_id=ends[0] if len(ends) == 1 else mark,
        pad_token_id=ends[0] if len(ends) == 1 else 0,
        prng_key=chosen.rng,
        **off,
        **dict.fromkeys(Constraints.__struct_fields__),  # ours are in their place
    ).sequences
    rows = np.asarray(sequences)[:, width:].tolist()
    if broken := [(row.index(mark) + 1, number) for number, row in enumerate(rows, 1) if mark in row]:
        token, number = min(broken)
        raise not_finite(f"at new token {token} of prompt {number}")
    lengths = (next((i + 1 for i, token in enumerate(row) if token in ends), None) for row in rows)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def own_constraints(model: Any) -> dict[str, Any]:
    """The settings of a model's generation config that forbid tokens, or force one."""
    return {name: getattr(model.generation_config, name, None) for name in Constraints.__struct_fields__}


def _processor(
    chosen: Sampling,
    rules: Constraints,
    ends: Sequence[int],
    given: Bool[np.ndarray, "batch width"],
    most: int,
) -> Callable[[Array, Array, Array], Array]:
    """Our sampling as a step of Hugging Face's loop.

    Args:
        chosen: how a token is chosen.
        rules: which tokens are forbidden, or forced.
        ends: the tokens that end a text.
        given: which columns of the prompts, or of the decoder's start, are tokens.
        most: new tokens, at most.
    """
    width = given.shape[1]

    def process(sequences: Array, logits: Array, length: Array) -> Array:
        """Logits with a column more, of a token that is chosen if and only if they are not finite.

        So Hugging Face's loop, which gives out nothing but tokens, need not stop for it. −∞ is allowed: a
        model may forbid a token by it.
        """
        there = jnp.broadcast_to(jnp.arange(sequences.shape[1]) < length, sequences.shape)
        there = there.at[:, :width].set(given)
        seen = None
        if chosen.repetition_penalty is not None:
            seen = jnp.zeros(logits.shape, bool).at[jnp.arange(len(there))[:, None], sequences].max(there)
        is_finite = jnp.all(logits < jnp.inf, axis=-1, keepdims=True)
        rows = Rows(sequences, there, given.sum(axis=1), length - width, most)
        allowed = constrain(rules, ends, rows, logits)
        kept = jnp.where(is_finite, chosen.adjust(allowed, seen), -jnp.inf)
        return jnp.concatenate([kept, jnp.where(is_finite, -jnp.inf, 0).astype(kept.dtype)], axis=-1)

    return process
