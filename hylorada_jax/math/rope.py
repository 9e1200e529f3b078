"""Rotary position embeddings: frequencies, their stretched variants, and the rotation.

Every variant returns the angular frequencies ω_i, i = 0 … head_dim/2 − 1, of RoFormer (Su et al.,
arXiv:2104.09864 §3.2.2); the stretched ones are those of transformers' ``ROPE_INIT_FUNCTIONS``. The host
computes them, all but those of dynamic NTK beyond the context, whose base depends on the positions of the
batch. In float32 they are rounded step by step like those that models are trained with: at position 8000, one
unit in the last place turns a head by up to 5e-4 radians.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def _periods(head_dim: int, theta: float, dtype: DTypeLike) -> Float[np.ndarray, " half"]:
    """1/ω_i = theta^(2i/head_dim), where the exponent and then the exact power are rounded to ``dtype``."""
    exponents = np.arange(0, head_dim, 2).astype(dtype) / np.asarray(head_dim, dtype)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(dtype)


def default_frequencies(head_dim: int, theta: float, dtype: DTypeLike) -> Float[np.ndarray, " half"]:
    """The frequencies of pretraining.

        ω_i = theta^(−2i/head_dim)

    Args:
        head_dim: width of one head, even.
        theta: base of the wavelengths.
        dtype: float32 or float64.

    Returns:
        [head_dim // 2] radians per token.

    Example:
        >>> default_frequencies(4, 10000.0, np.float64).tolist()
        [1.0, 0.01]
    """
    return 1 / _periods(head_dim, theta, dtype)


def linear_frequencies(
    head_dim: int, theta: float, dtype: DTypeLike, *, factor: float
) -> Float[np.ndarray, " half"]:
    """Position interpolation: every wavelength grows by ``factor`` (Chen et al., arXiv:2306.15595).

        ω_i = default_i / factor

    Args:
        head_dim: width of one head, even.
        theta: base of the wavelengths.
        dtype: float32 or float64.
        factor: the stretch.

    Returns:
        [head_dim // 2] radians per token.
    """
    return default_frequencies(head_dim, theta, dtype) / factor


def proportional_frequencies(
    head_dim: int, theta: float, dtype: DTypeLike, *, part: float, factor: float
) -> Float[np.ndarray, " half"]:
    """The first pairs of dimensions rotate as in a whole head, the others stay as they are.

        ω_i = default_i / factor  for i < ⌊part·head_dim / 2⌋,  else 0

    Args:
        head_dim: width of one head, even.
        theta: base of the wavelengths.
        dtype: float32 or float64.
        part: of the pairs, those that rotate.
        factor: the stretch.

    Returns:
        [head_dim // 2] radians per token.

    Example:
        >>> proportional_frequencies(4, 10000.0, np.float64, part=0.5, factor=2.0).tolist()
        [0.5, 0.0]
    """
    rotating = np.arange(head_dim // 2) < int(part * head_dim // 2)
    return np.where(rotating, default_frequencies(head_dim, theta, dtype) / np.asarray(factor, dtype), 0)


def dynamic_frequencies(
    head_dim: int,
    theta: float,
    dtype: DTypeLike,
    *,
    factor: float,
    max_positions: int,
    positions: Int[Array, "*shape"],
) -> Float[Array, " half"]:
    """Dynamic NTK: the base grows once the longest text of the batch outgrows the context.

        base = theta · (factor·n / max_positions − (factor − 1))^(head_dim / (head_dim − 2)),
        n = max(max_positions, 1 + the largest position);   ω_i = base^(−2i/head_dim)

    The frequencies depend on the longest text of the call, as in transformers: beyond ``max_positions`` a
    packed document and the same document alone, or cached and full decoding, differ.

    Args:
        head_dim: width of one head, even and above 2.
        theta: base of the wavelengths.
        dtype: float32 or float64.
        factor: the stretch.
        max_positions: context of pretraining, in tokens.
        positions: position of every token of the call.

    Returns:
        [head_dim // 2] radians per token.
    """
    length = jnp.maximum(jnp.max(positions) + 1, max_positions)
    stretch = factor * length.astype(dtype) / max_positions - (factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    stretched = 1 / base ** jnp.asarray(np.arange(0, head_dim, 2) / head_dim, dtype)
    return jnp.where(length > max_positions, stretched, default_frequencies(head_dim, theta, dtype))


def llama3_frequencies(
    head_dim: int,
    theta: float,
    dtype: DTypeLike,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original: int,
) -> Float[np.ndarray, " half"]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.

        t_i = (original·ω_i/2π − low) / (high − low), clamped to [0, 1]
        ω'_i = t_i·ω_i + (1 − t_i)·ω_i / factor

    Args:
        head_dim: width of one head, even.
        theta: base of the wavelengths.
        dtype: float32 or float64.
        factor: the stretch.
        low_freq_factor: turns per original context below which a frequency is stretched in full.
        high_freq_factor: turns per original context above which a frequency is kept.
        original: context of pretraining, in tokens.

    Returns:
        [head_dim // 2] radians per token.

    Source:
        Llama 3.1's reference code; transformers ``_compute_llama3_parameters``.
    """
    frequencies = default_frequencies(head_dim, theta, dtype)
    turns = original / (2 * math.pi / frequencies)
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / factor


def yarn_frequencies(
    head_dim: int,
    theta: float,
    dtype: DTypeLike,
    *,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Float[np.ndarray, " half"]:
    """YaRN: a linear ramp over the dimensions, from kept to stretched (Peng et al., arXiv:2309.00071 §3.2).

        d(β) = head_dim · ln(original / 2πβ) / (2 ln theta)        the dimension with β turns in ``original``
        t_i = clamp((i − d(fast)) / (d(slow) − d(fast)), 0, 1);    ω'_i = (1 − t_i)·ω_i + t_i·ω_i / factor

    Args:
        head_dim: width of one head, even.
        theta: base of the wavelengths.
        dtype: float32 or float64.
        factor: the stretch.
        original: context of pretraining, in tokens.
        beta_fast: turns above which a dimension is kept.
        beta_slow: turns below which a dimension is stretched in full.
        truncate: widen the ramp to whole dimensions.

    Returns:
        [head_dim // 2] radians per token.
    """

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # 0.001: transformers' guard against an empty ramp.
    ramp = np.clip((np.arange(head_dim // 2).astype(dtype) - low) / (high - low or 0.001), 0.0, 1.0)
    keep, periods = 1 - ramp, _periods(head_dim, theta, dtype)
    return 1 / (factor * periods) * (1 - keep) + 1 / periods * keep


def longrope_frequencies(
    head_dim: int,
    theta: float,
    dtype: DTypeLike,
    *,
    short: Sequence[float],
    long: Sequence[float],
    original: int,
    positions: Int[Array, "*shape"],
) -> Float[Array, " half"]:
    """LongRoPE: each wavelength grows by a factor of its own, found for short texts and for long ones.

        ω'_i = ω_i / short_i,  or  ω_i / long_i once the longest text of the call outgrows ``original``

    As in transformers, a packed document and the same document alone may so differ. What is cached holds up
    to ``original`` tokens, and is computed anew for a text that outgrows them.

    Args:
        head_dim: width of the rotated part of a head, even.
        theta: base of the wavelengths.
        dtype: float32 or float64.
        short: factors, [head_dim // 2].
        long: the same for longer texts.
        original: context of pretraining, in tokens.
        positions: position of every token of the call.

    Returns:
        [head_dim // 2] radians per token.

    Source: Ding et al. 2024, arXiv:2402.13753 §3.
    """
    periods = _periods(head_dim, theta, dtype)
    stretched = [1 / (np.asarray(factors, dtype) * periods) for factors in (short, long)]
    return jnp.where(jnp.max(positions) + 1 > original, stretched[1], stretched[0])


def rope_tables(
    positions: Int[Array, "batch seq"],
    frequencies: Float[Array, " half"] | Float[np.ndarray, " half"],
    *,
    attention_factor: float = 1.0,
    dtype: DTypeLike,
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosines and sines of every token's angles.

        cos = attention_factor · cos(p·ω),  sin = attention_factor · sin(p·ω)

    Args:
        positions: position of every token.
        frequencies: radians per token.
        attention_factor: YaRN's temperature, 1 elsewhere.
        dtype: float32 or float64; bfloat16 cannot tell position 257 from 256.

    Returns:
        cos and sin.
    """
    angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates dimension i against dimension i + n/2 (the halves of Llama's weights, not neighbours).

        y₁ = x₁·cos − x₂·sin,   y₂ = x₂·cos + x₁·sin,   y₃ = x₃ beyond the first n = 2·half dimensions

    Args:
        x: queries or keys.
        cos: from ``rope_tables``.
        sin: from ``rope_tables``.

    Returns:
        The rotated x, in x's dtype; the rotation itself runs in the dtype of the tables.

    Example:
        >>> quarter = (jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))
        >>> apply_rope(jnp.array([[[[1.0, 0.0]]]]), *quarter).tolist()
        [[[[0.0, 1.0]]]]
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(cos.dtype), [half, 2 * half], axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest], axis=-1).astype(x.dtype)
