"""How the layers of our decoder rotate queries and keys."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from hylorada_jax.math import rope
from hylorada_jax.models.decoder_config import DecoderConfig

Tables = Float[Array, "rotations batch query half"]
Frequencies = Float[Array, " half"] | Float[np.ndarray, " half"]


def rotary_tables(
    config: DecoderConfig, position_ids: Int[Array, "batch query"], dtype: DTypeLike
) -> tuple[Tables, Tables, Int[Array, " layers"]]:
    """The cosines and sines of each rotation that layers differ in, and which of them is each layer's.

    Args:
        config: the decoder's configuration.
        position_ids: position of every token.
        dtype: float32 or float64.

    Returns:
        Cosines, sines, and for each layer its place on their first axis.
    """
    c = config
    kinds: list[tuple[Frequencies, float]] = [
        (frequencies(c, position_ids, dtype), c.rope_scaling.attention_factor)
    ]
    places = np.zeros(c.num_hidden_layers, np.int32)
    if c.sliding_rope_theta is not None:
        places[[*c.sliding_layers]] = len(kinds)
        kinds.append((rope.default_frequencies(c.rotated, c.sliding_rope_theta, dtype), 1.0))
    if any(c.unrotated_layers):
        places[[*c.unrotated_layers]] = len(kinds)
        kinds.append((np.zeros(c.rotated // 2, dtype), 1.0))  # an angle of 0 everywhere
    tables = (rope.rope_tables(position_ids, f, attention_factor=a, dtype=dtype) for f, a in kinds)
    cos, sin = (jnp.stack(table) for table in zip(*tables, strict=True))
    return cos, sin, jnp.asarray(places)


def frequencies(
    config: DecoderConfig, position_ids: Int[Array, "batch query"], dtype: DTypeLike
) -> Frequencies:
    """The rotary frequencies that the config asks for, of layers that have none of their own.

    Args:
        config: the decoder's configuration.
        position_ids: position of every token; dynamic NTK and LongRoPE depend on the last one.
        dtype: float32 or float64.
    """
    s, base = config.rope_scaling, (config.rotated, config.rope_theta, dtype)
    match s.rope_type:
        case "linear":
            return rope.linear_frequencies(*base, factor=s.factor)
        case "dynamic":
            length = config.max_position_embeddings
            return rope.dynamic_frequencies(
                *base, factor=s.factor, max_positions=length, positions=position_ids
            )
        case "llama3":
            return rope.llama3_frequencies(
                *base,
                factor=s.factor,
                low_freq_factor=s.low_freq_factor,
                high_freq_factor=s.high_freq_factor,
                original=s.original_max_position_embeddings,
            )
        case "yarn":
            return rope.yarn_frequencies(
                *base,
                factor=s.factor,
                original=s.original_max_position_embeddings,
                beta_fast=s.beta_fast,
                beta_slow=s.beta_slow,
                truncate=s.truncate,
            )
        case "longrope":
            return rope.longrope_frequencies(
                *base,
                short=s.short_factors,
                long=s.long_factors,
                original=s.original_max_position_embeddings,
                positions=position_ids,
            )
        case "proportional":
            return rope.proportional_frequencies(*base, part=s.rotated_part, factor=s.factor)
        case _:
            return rope.default_frequencies(*base)
