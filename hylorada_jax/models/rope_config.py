"""How a model rotates its queries and keys, read from either layout of a Hugging Face config.

transformers 4 keeps ``rope_theta`` beside ``rope_scaling``, transformers 5 both in ``rope_parameters``. Files
with keys of both exist; what transformers 5 computes from them is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hylorada_jax.errors import ModelError

_LLAMA3 = frozenset({"factor", "low_freq_factor", "high_freq_factor"})
_YARN = frozenset(
    {"attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "truncate"}
)
# Keys of a scaling beside its type and original_max_position_embeddings: required, optional.
_ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (_LLAMA3, frozenset()),
    "yarn": (frozenset(), _YARN),
}
_TYPES = ("rope_type", "type")
_ORIGINAL = "original_max_position_embeddings"


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
    def from_hf(
        cls, raw: Mapping[str, Any] | None, max_positions: int, original: int | None = None
    ) -> RopeScaling:
        """Reads rope_scaling, or the rope_parameters of transformers 5; refuses a key that would be ignored.

        A null counts as an absent key; only ``"truncate": null`` is false, as in transformers.

        Args:
            raw: the dict of config.json, with its type under "rope_type" or, older, "type"; None: no stretch.
            max_positions: the model's max_position_embeddings.
            original: the config's own original_max_position_embeddings, which goes before the dict's.

        Returns:
            The scaling.

        Raises:
            ModelError: the type is unknown, a key is missing, or one is not among the type's own.

        Example:
            >>> RopeScaling.from_hf({"type": "linear", "factor": 4.0}, 2048).factor
            4.0
        """
        given = {key: value for key, value in (raw or {}).items() if value is not None}
        if layered := [key for key, value in given.items() if isinstance(value, Mapping)]:
            raise ModelError(
                "all layers of a model of our decoder share their rope_parameters",
                f"rope_parameters for each of {', '.join(layered)}",
                "take a model whose layers share them; transformers reads no others in these families",
            )
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(
                "this decoder rotates whole heads",
                f"partial_rotary_factor={raw['partial_rotary_factor']!r} among the rope parameters",  # type: ignore[index]
                "take a version of the model without it",
            )
        given.pop("rope_theta", None)
        if not given:
            return cls()
        types = [given.pop(key) for key in _TYPES if key in given]
        kind = types[0] if types else None
        if kind not in _ROPE_KEYS:
            raise ModelError(
                "the rope type must be one of " + ", ".join(_ROPE_KEYS),
                f"rope_scaling={dict(raw or {})!r}",
                "take a version of the model with one of these, or set rope_scaling to null for short texts",
            )
        if kind == "default":
            return cls()
        own = given.pop(_ORIGINAL, max_positions)
        required, optional = _ROPE_KEYS[kind]
        if kind in ("linear", "dynamic") and own != max_positions:
            given[_ORIGINAL] = own  # transformers would ignore it; the same number says nothing new
        missing, unknown = required - given.keys(), given.keys() - required - optional
        if missing or unknown:
            raise ModelError(
                f"rope_scaling of type {kind} takes {sorted(required)}, and optionally {sorted(optional)}",
                f"missing {sorted(missing)}, unknown {sorted(unknown)}",
                "check rope_scaling in config.json",
            )
        if kind in ("llama3", "yarn"):
            given[_ORIGINAL] = original or own
        if kind == "yarn":
            given = _yarn(given, max_positions)
            given["truncate"] = bool((raw or {}).get("truncate", True))
        return cls(rope_type=kind, **given)


def read_rope(hf: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling]:
    """The base of the rotary wavelengths and their stretch, as transformers 5 reads them.

    A rope_scaling that is not empty wins over rope_parameters; a rope_theta inside the chosen one wins over
    the config's own.

    Args:
        hf: the content of config.json.
        max_positions: the model's max_position_embeddings.

    Returns:
        rope_theta, 10000 where nothing says it, and the scaling.

    Raises:
        ModelError: as ``RopeScaling.from_hf``.

    Example:
        >>> read_rope({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, 2048)[0]
        500000.0
    """
    raw = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    theta = next(
        (value for place in (raw, hf) if (value := place.get("rope_theta")) is not None),
        10000.0,
    )
    return float(theta), RopeScaling.from_hf(raw, max_positions, hf.get(_ORIGINAL))


def _yarn(given: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """YaRN's settings, with transformers' own where one is absent (or, of the two betas, zero)."""
    factor = given.get("factor", max_positions / given[_ORIGINAL])

    def temperature(mscale: float) -> float:
        """0.1·mscale·ln(factor) + 1 (YaRN §3.4)."""
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = temperature(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        attention_factor = temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return {
        _ORIGINAL: given[_ORIGINAL],
        "factor": factor,
        "beta_fast": given.get("beta_fast") or 32.0,
        "beta_slow": given.get("beta_slow") or 1.0,
        "attention_factor": given.get("attention_factor", attention_factor),
    }
