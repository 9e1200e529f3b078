"""How a model stretches its rotary frequencies, read from ``rope_scaling`` in a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hylorada_jax.errors import ModelError

# Keys of rope_scaling: required, optional.
_ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "original_max_position_embeddings",
                "truncate",
            }
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pretraining; see ``hylorada_jax.math.rope``.

    Args:
        rope_type: 'default', 'linear', 'dynamic', 'llama3' or 'yarn'.
        factor: the stretch, >= 1.
        original_max_position_embeddings: context length of pretraining, in tokens (llama3, yarn).
        low_freq_factor: llama3: wavelengths above original / low_freq_factor are stretched in full.
        high_freq_factor: llama3: wavelengths below original / high_freq_factor are left alone.
        beta_fast: yarn: dimensions that turn more often than this are left alone.
        beta_slow: yarn: dimensions that turn less often than this are stretched in full.
        truncate: yarn: round the two bounds to whole dimensions.
        attention_factor: yarn: what cos and sin are multiplied by.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any] | None, max_positions: int) -> RopeScaling:
        """Reads rope_scaling, or the rope_parameters of transformers 5; refuses a key that would be ignored.

        Args:
            raw: the dict of config.json, with its type under "rope_type" or, older, "type"; None: no stretch.
            max_positions: the model's max_position_embeddings.

        Returns:
            The scaling.

        Raises:
            ModelError: the type is unknown, a key is missing, or one is not among the type's own.

        Example:
            >>> RopeScaling.from_hf({"type": "linear", "factor": 4.0}, 2048).factor
            4.0
        """
        if not raw:
            return cls()
        names = {raw[key] for key in ("rope_type", "type") if key in raw}
        kind = names.pop() if len(names) == 1 else None
        given = {
            key: value
            for key, value in raw.items()
            if key not in ("rope_type", "type", "rope_theta") and value is not None
        }
        if kind == "default":
            return cls()
        if kind not in _ROPE_KEYS:
            raise ModelError(
                "the rope type must be one of " + ", ".join(_ROPE_KEYS),
                f"rope_scaling={dict(raw)!r}",
                "take a version of the model with one of these, or set rope_scaling to null for short texts",
            )
        required, optional = _ROPE_KEYS[kind]
        if kind in ("linear", "dynamic") and given.get("original_max_position_embeddings") == max_positions:
            del given["original_max_position_embeddings"]  # says what the formula takes anyway
        missing, unknown = required - given.keys(), given.keys() - required - optional
        if missing or unknown:
            raise ModelError(
                f"rope_scaling of type {kind} takes {sorted(required)}, and optionally {sorted(optional)}",
                f"missing {sorted(missing)}, unknown {sorted(unknown)}",
                "check rope_scaling in config.json",
            )
        if kind == "yarn":
            given.setdefault("original_max_position_embeddings", max_positions)
            given.setdefault("attention_factor", _yarn_attention_factor(given))
        mscales = ("mscale", "mscale_all_dim")
        return cls(rope_type=kind, **{key: value for key, value in given.items() if key not in mscales})


def _yarn_attention_factor(given: Mapping[str, Any]) -> float:
    """0.1·mscale·ln(factor) + 1, over the same with mscale_all_dim when both are given (YaRN §3.4)."""

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return temperature(1.0)
