"""How a model rotates its queries and keys, read from either layout of a Hugging Face config.

transformers 4 keeps ``rope_theta`` beside ``rope_scaling``, transformers 5 both in ``rope_parameters``. Files
with keys of both exist; what transformers 5 computes from them is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import REMEDY, RULE, Positions, Theta

_Factor = Annotated[float, Meta(gt=0, le=1e6)]
_Perhaps = Annotated[float, Meta(ge=0, le=1e6)]  # transformers takes 0 for absent


class _Rope(Struct):
    """Where a config can say how a model rotates."""

    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Positions | None = None


# The keys of each type of scaling, beside the type itself.
class _Default(Struct):
    pass


class _Linear(Struct, forbid_unknown_fields=True):
    factor: _Factor


class _Proportional(Struct, forbid_unknown_fields=True):
    factor: _Factor = 1.0
    partial_rotary_factor: Annotated[float, Meta(ge=0, le=1)] = 1.0


class _Llama3(Struct, forbid_unknown_fields=True):
    factor: _Factor
    low_freq_factor: _Factor
    high_freq_factor: _Factor
    original_max_position_embeddings: Positions


class _Yarn(Struct, forbid_unknown_fields=True):
    original_max_position_embeddings: Positions
    factor: _Factor | None = None
    attention_factor: _Factor | None = None
    beta_fast: _Perhaps = 0.0
    beta_slow: _Perhaps = 0.0
    mscale: _Perhaps = 0.0
    mscale_all_dim: _Perhaps = 0.0
    truncate: bool = True


_Factors = Annotated[list[_Factor], Meta(min_length=1, max_length=2**16)]


class _LongRope(Struct, forbid_unknown_fields=True):
    short_factor: _Factors
    long_factor: _Factors
    original_max_position_embeddings: Annotated[int, Meta(ge=2, lt=2**31)]  # its logarithm divides
    attention_factor: _Factor | None = None


_KINDS: dict[str, type[Struct]] = {
    "default": _Default, "linear": _Linear, "dynamic": _Linear, "llama3": _Llama3, "yarn": _Yarn,
    "longrope": _LongRope, "proportional": _Proportional,
}  # fmt: skip
_FORMERLY = {"su": "longrope"}
_TYPES = ("rope_type", "type")
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pretraining; see ``hylorada_jax.math.rope``.

    Args:
        rope_type: 'default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope' or 'proportional'.
        factor: the stretch, > 0.
        original_max_position_embeddings: context length of pretraining, in tokens (llama3, yarn, longrope).
        low_freq_factor: llama3: wavelengths above original / low_freq_factor are stretched in full.
        high_freq_factor: llama3: wavelengths below original / high_freq_factor are left alone.
        beta_fast: yarn: dimensions that turn more often than this are left alone.
        beta_slow: yarn: dimensions that turn less often than this are stretched in full.
        truncate: yarn: round the two bounds to whole dimensions.
        attention_factor: yarn, longrope: what cos and sin are multiplied by.
        short_factors: longrope: the stretch of each wavelength in texts no longer than that of pretraining.
        long_factors: longrope: the same in longer ones.
        rotated_part: proportional: the part of the pairs of dimensions that rotates, from the first on.
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotated_part: float = 1.0

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
            ModelError: the type is unknown, a key is missing or is not among the type's own, or a value is of
                the wrong type or out of bounds.

        Example:
            >>> RopeScaling.from_hf({"type": "linear", "factor": 4.0}, 2048).factor
            4.0
        """
        given = {key: value for key, value in (raw or {}).items() if value is not None}
        if layered := [key for key, value in given.items() if isinstance(value, Mapping)]:
            raise ModelError(
                "All layers of a model of our decoder share their rope_parameters.",
                f"rope_parameters for each of {', '.join(layered)}",
                "Take a model whose layers share them; transformers reads no others in these families.",
            )
        rotated_part = given.pop("partial_rotary_factor", None)
        given.pop("rope_theta", None)
        if not given:
            return cls()
        types = [given.pop(key) for key in _TYPES if key in given]
        kind = _FORMERLY.get(types[0], types[0]) if types and isinstance(types[0], str) else None
        if kind == "proportional" and rotated_part is not None:
            given["partial_rotary_factor"] = rotated_part
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ModelError(
                f"The rope type must be one of {', '.join(_KINDS)}.",
                f"rope_type={types[0] if types else None!r}",
                "Take a version of the model with one of these, or set rope_scaling to null for short texts.",
            )
        if kind in ("llama3", "yarn", "longrope"):
            given[ORIGINAL] = original or given.get(ORIGINAL, max_positions)
        elif given.get(ORIGINAL) == max_positions:
            del given[ORIGINAL]  # says nothing new; transformers would ignore another number
        if kind == "yarn" and "truncate" in (raw or {}):
            given.setdefault("truncate", False)
        takes = ", ".join(_KINDS[kind].__struct_fields__)
        rule = f"rope_scaling of type {kind} takes {takes}, each within its bounds."
        keys = checked(given, _KINDS[kind], rule, ModelError, "Check rope_scaling in config.json.")
        match keys:
            case _Yarn():
                settings = _yarn(keys, max_positions)
            case _LongRope():
                settings = _longrope(keys, max_positions)
            case _Proportional():
                settings = {"factor": keys.factor, "rotated_part": keys.partial_rotary_factor}
            case _:
                settings = msgspec.structs.asdict(keys)
        scaling = cls(rope_type=kind, **settings)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(scaling, low) < getattr(scaling, high):
                raise ModelError(
                    f"{low} must be below {high}.",
                    f"{low}={getattr(scaling, low)}, {high}={getattr(scaling, high)}",
                    "Check rope_scaling in config.json.",
                )
        return scaling


def read_rope(
    hf: Mapping[str, Any], max_positions: int, default_theta: float = 10000.0
) -> tuple[float, RopeScaling]:
    """The base of the rotary wavelengths and their stretch, as transformers 5 reads them.

    A rope_scaling that is not empty wins over rope_parameters; a rope_theta inside the chosen one wins over
    the config's own.

    Args:
        hf: the content of config.json.
        max_positions: the model's max_position_embeddings.
        default_theta: rope_theta where nothing says it.

    Returns:
        rope_theta and the scaling.

    Raises:
        ModelError: as ``RopeScaling.from_hf``.

    Example:
        >>> read_rope({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, 2048)[0]
        500000.0
    """
    said = checked(
        {key: hf[key] for key in _Rope.__struct_fields__ if key in hf}, _Rope, RULE, ModelError, REMEDY
    )
    raw = said.rope_scaling or said.rope_parameters or {}
    inner = checked({"rope_theta": raw.get("rope_theta")}, _Rope, RULE, ModelError, REMEDY)
    theta = inner.rope_theta or said.rope_theta or default_theta
    return theta, RopeScaling.from_hf(raw, max_positions, said.original_max_position_embeddings)


def partial_rotary_factor(hf: Mapping[str, Any]) -> Any:
    """The part of a head that rotates, from either layout of a config; 1 where nothing says it.

    Proportional rotation is of whole heads, in which some pairs have an angle of 0.
    """
    said = [hf.get("partial_rotary_factor")]
    for layout in ("rope_parameters", "rope_scaling"):
        if isinstance(inner := hf.get(layout), Mapping) and inner.get("rope_type") != "proportional":
            said.insert(0, inner.get("partial_rotary_factor"))
    return next((part for part in said if part is not None), 1.0)


def _longrope(keys: _LongRope, max_positions: int) -> dict[str, Any]:
    """LongRoPE's settings, with transformers' own factor of cos and sin where there is none."""
    original = keys.original_max_position_embeddings
    stretch = max_positions / original
    own = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {
        ORIGINAL: original,
        "attention_factor": keys.attention_factor or own,
        "short_factors": tuple(keys.short_factor),
        "long_factors": tuple(keys.long_factor),
    }


def _yarn(keys: _Yarn, max_positions: int) -> dict[str, Any]:
    """YaRN's settings, with transformers' own where one is absent (or, of the two betas, zero)."""
    factor = keys.factor or max_positions / keys.original_max_position_embeddings

    def temperature(mscale: float) -> float:
        """0.1·mscale·ln(factor) + 1 (YaRN §3.4)."""
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = temperature(1.0)
    if keys.mscale and keys.mscale_all_dim:
        attention_factor = temperature(keys.mscale) / temperature(keys.mscale_all_dim)
    return {
        ORIGINAL: keys.original_max_position_embeddings,
        "factor": factor,
        "beta_fast": keys.beta_fast or 32.0,
        "beta_slow": keys.beta_slow or 1.0,
        "attention_factor": keys.attention_factor or attention_factor,
        "truncate": keys.truncate,
    }
