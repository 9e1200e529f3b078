"""The settings of a HyLoRADA adapter, shared by the JAX and the PyTorch package.

Imports neither jax nor torch, so that either package can read it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hylorada_jax.errors import ConfigError

QV = ("q", "v")
QKVO = ("q", "k", "v", "o")

# What each named method switches on. "roles" are the attention projections it adapts by default.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"roles": QV},
    "dora": {"roles": QKVO, "use_dora": True},
    "lorada": {"roles": QKVO, "daa_enabled": True},
    "longlora": {"roles": QKVO, "s2_attn_enabled": True},
    "sparse": {"roles": (), "sparse_enabled": True},
    "hylorada_v1": {"roles": QKVO, "use_hylorada": True},
    "hylorada_v2": {"roles": QKVO, "use_hylorada": True, "use_hylorada_v2": True},
    "hylorada": {"roles": QKVO, "use_hylorada": True, "position_bias_enabled": True, "daa_enabled": True},
}

_SWITCHES = (
    "use_dora",
    "use_hylorada",
    "use_hylorada_v2",
    "position_bias_enabled",
    "daa_enabled",
    "sparse_enabled",
    "s2_attn_enabled",
)
# Which linear layer a method has is part of its name, so these may not contradict it.
_LINEAR_SWITCHES = _SWITCHES[:3]

RANK_STRATEGIES = ("uniform", "importance", "decreasing")
STRUCTURE_ENCODERS = ("default", "temporal")

PRESETS: dict[str, dict[str, Any]] = {
    "efficient": {"lora_rank": 4, "lora_alpha": 8.0, "target_modules": QV},
    "balanced": {"lora_rank": 8, "lora_alpha": 16.0},
    "quality": {"lora_rank": 16, "lora_alpha": 32.0, "target_modules": ("all-linear",)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyLoRADAConfig:
    """What is adapted, by which layer, and at which rates.

    A switch left at None takes the value that ``method`` implies; after construction every switch is a
    bool. Without a method, the switches choose it: ``use_hylorada_v2`` gives ``hylorada_v2``, ``use_dora``
    gives ``dora``, ``use_hylorada=False`` gives ``lora``, ``position_bias_enabled`` gives ``hylorada``, and
    nothing at all gives ``hylorada_v1``.

    Args:
        method: lora, dora, lorada, longlora, sparse, hylorada_v1, hylorada_v2 or hylorada.
        use_dora: adapt by :class:`DoRALinear`.
        use_hylorada: adapt by :class:`HyLoRADALinear` or one of its extensions.
        use_hylorada_v2: scale the update by a structure prior.
        lora_rank: r, the rank of the update, ≥ 1.
        lora_alpha: α; the update is scaled by α/r.
        lora_dropout: probability in [0, 1) of dropping an input of the low-rank path in training.
        use_rslora: scale by α/√r instead (Kalajdzievski 2023).
        rank_strategy: uniform; importance (smaller ranks in the middle); decreasing (smaller with depth).
        target_modules: layer names, regular expressions over full names, or "all-linear"; None takes the
            attention projections the method names. The roles q, k, v and o stand for the model's own
            names of these projections.
        exclude_modules: names or regular expressions to leave out again.
        gate_init: initial magnitude_gate; g = σ(gate_init).
        residual_init: initial residual_weight; β = σ(residual_init).
        detach_norm: stop the gradient at ‖W + sBA‖. None: True for DoRA (its paper, §4.3), else False.
        magnitude_scales_bias: let the column scale act on the layer's bias too.
        lora_plus_enabled: train lora_B at ``lora_plus_ratio`` times the rate of lora_A (LoRA+).
        lora_plus_ratio: that ratio, > 0.
        position_bias_enabled: scale the update by a learned function of the position.
        daa_enabled: direct attention adaptation.
        sparse_enabled: a sparse adapter after every MLP block.
        s2_attn_enabled: shifted sparse attention in training.
        structure_dim: width of the structure prior.
        structure_encoder_type: default or temporal.

    Raises:
        ConfigError: a value is out of range, unknown, or contradicts another.

    Example:
        >>> config = HyLoRADAConfig(lora_rank=8, lora_alpha=16.0, use_hylorada=True)
        >>> config.method
        'hylorada_v1'
        >>> HyLoRADAConfig.from_json(config.to_json()) == config
        True
    """

    method: str | None = None
    use_dora: bool | None = None
    use_hylorada: bool | None = None
    use_hylorada_v2: bool | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_strategy: str = "uniform"
    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] = ()
    gate_init: float = 0.0
    residual_init: float = 0.1
    detach_norm: bool | None = None
    magnitude_scales_bias: bool = False
    lora_plus_enabled: bool = True
    lora_plus_ratio: float = 10.0
    position_bias_enabled: bool | None = None
    daa_enabled: bool | None = None
    sparse_enabled: bool | None = None
    s2_attn_enabled: bool | None = None
    structure_dim: int = 32
    structure_encoder_type: str = "default"

    def __post_init__(self) -> None:
        self._set("target_modules", _names("target_modules", self.target_modules))
        self._set("exclude_modules", _names("exclude_modules", self.exclude_modules) or ())
        for name in ("lora_alpha", "lora_dropout", "gate_init", "residual_init", "lora_plus_ratio"):
            self._set(name, _number(name, getattr(self, name)))
        self._resolve_method()
        if self.detach_norm is None:
            self._set("detach_norm", bool(self.use_dora))
        self._check()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_method(self) -> None:
        if self.method is None:
            self._set("method", self._method_of_switches())
        if self.method not in METHODS:
            raise ConfigError(
                f"method must be one of {', '.join(METHODS)}", repr(self.method), _near(self.method, METHODS)
            )
        implied = METHODS[self.method]
        for name in _SWITCHES:
            given, default = getattr(self, name), implied.get(name, False)
            if given is not None and not isinstance(given, bool):
                raise ConfigError(f"{name} must be True, False or None", repr(given), "Give a bool.")
            if name in _LINEAR_SWITCHES and given not in (None, default):
                raise ConfigError(
                    f"{name} must agree with the method: {self.method!r} has {name}={default}",
                    given,
                    f"Leave {name} out, or choose another method.",
                )
            self._set(name, default if given is None else given)

    def _method_of_switches(self) -> str:
        if self.use_hylorada_v2:
            return "hylorada_v2"
        if self.use_dora:
            return "dora"
        if self.use_hylorada is False:
            return "lora"
        return "hylorada" if self.position_bias_enabled else "hylorada_v1"

    def _check(self) -> None:
        _require(
            _is_int(self.lora_rank) and self.lora_rank >= 1,
            "lora_rank must be an integer ≥ 1",
            self.lora_rank,
        )
        _require(self.lora_alpha > 0, "lora_alpha must be > 0", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "lora_dropout must be in [0, 1)", self.lora_dropout)
        _require(self.lora_plus_ratio > 0, "lora_plus_ratio must be > 0", self.lora_plus_ratio)
        _require(
            _is_int(self.structure_dim) and self.structure_dim >= 1,
            "structure_dim must be an integer ≥ 1",
            self.structure_dim,
        )
        for name in ("use_rslora", "detach_norm", "magnitude_scales_bias", "lora_plus_enabled"):
            _require(isinstance(getattr(self, name), bool), f"{name} must be a bool", getattr(self, name))
        for name, allowed in (
            ("rank_strategy", RANK_STRATEGIES),
            ("structure_encoder_type", STRUCTURE_ENCODERS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(allowed)}", repr(value), _near(value, allowed)
                )
        if self.position_bias_enabled and (self.use_hylorada_v2 or not self.use_hylorada):
            raise ConfigError(
                "position_bias_enabled acts in the Unified layer, which only method='hylorada' has",
                f"method={self.method!r}, position_bias_enabled=True",
                "Choose method='hylorada', or leave position_bias_enabled out.",
            )

    @property
    def linear(self) -> str | None:
        """The linear adapter's kind: lora, dora, hylorada_v1, hylorada_v2, hylorada, or None."""
        if self.method == "sparse":
            return None
        if self.use_dora:
            return "dora"
        if self.use_hylorada_v2:
            return "hylorada_v2"
        if self.use_hylorada:
            return "hylorada" if self.position_bias_enabled else "hylorada_v1"
        return "lora"

    @property
    def roles(self) -> tuple[str, ...]:
        """The attention projections that the method adapts when ``target_modules`` is None."""
        return METHODS[str(self.method)]["roles"]

    def scale(self, rank: int) -> float:
        """s of a layer of this rank: α keeps its ratio to r, so s = α_r/r or, with rsLoRA, α_r/√r.

        Args:
            rank: the layer's own rank, which a rank strategy may have lowered.

        Returns:
            s, as a Python float.
        """
        alpha = self.lora_alpha * rank / self.lora_rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def layer_rank(self, layer: int, num_layers: int) -> int:
        """The rank at a depth: ⌊r·(1 − ½·t)⌋, at least 2 (or r, if that is less).

        t is 0 for ``uniform``, min(i, L−1−i)/(L/2) for ``importance`` and i/(L−1) for ``decreasing``.

        Args:
            layer: i, counted from 0.
            num_layers: L.

        Returns:
            The rank of layer i.

        Example:
            >>> config = HyLoRADAConfig(lora_rank=8, rank_strategy="decreasing")
            >>> [config.layer_rank(i, 5) for i in range(5)]
            [8, 7, 6, 5, 4]
        """
        if self.rank_strategy == "uniform" or num_layers == 1:
            return self.lora_rank
        if self.rank_strategy == "importance":
            t = min(layer, num_layers - 1 - layer) / (num_layers / 2)
        else:
            t = layer / (num_layers - 1)
        return max(min(2, self.lora_rank), math.floor(self.lora_rank * (1 - t / 2)))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    def to_json(self) -> str:
        """The settings as a JSON text that :meth:`from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> HyLoRADAConfig:
        """The config of a mapping from setting names to values.

        Args:
            settings: any of the class's arguments.

        Raises:
            ConfigError: a name is not a setting, or a value is refused.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            remedy = " ".join(_near(name, known) for name in unknown)
            raise ConfigError("Every key must be a setting of HyLoRADAConfig", ", ".join(unknown), remedy)
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> HyLoRADAConfig:
        """The config of a JSON text.

        Raises:
            ConfigError: the text is not a JSON object of settings.
        """
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                "A config must be JSON", error, "Write it with HyLoRADAConfig.to_json()."
            ) from error
        if not isinstance(settings, dict):
            raise ConfigError(
                "A config must be a JSON object", type(settings).__name__, "Write it with to_json()."
            )
        return cls.from_dict(settings)

    @classmethod
    def load(cls, path: str | Path) -> HyLoRADAConfig:
        """The config of a JSON file; a ConfigError when there is none at ``path``."""
        if not Path(path).is_file():
            raise ConfigError("A config file must exist", path, "Check the path.")
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> HyLoRADAConfig:
        """A ready choice: efficient (r = 4 on q, v), balanced (r = 8), quality (r = 16, all linear layers).

        Args:
            name: efficient, balanced or quality.
            settings: further settings; they win over the preset's.

        Raises:
            ConfigError: no preset has that name, or a setting is refused.

        Example:
            >>> HyLoRADAConfig.preset("quality", method="dora").lora_rank
            16
        """
        if name not in PRESETS:
            raise ConfigError(f"A preset is one of {', '.join(PRESETS)}", repr(name), _near(name, PRESETS))
        return cls.from_dict({**PRESETS[name], **settings})


def _names(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not all(isinstance(item, str) and item for item in names) or (not names and name == "target_modules"):
        raise ConfigError(
            f"{name} must be non-empty strings", repr(value), 'For example ("q_proj", "v_proj").'
        )
    return names


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(is_number and math.isfinite(value), f"{name} must be a finite number", value)  # type: ignore[arg-type]
    return float(value)  # type: ignore[arg-type]


def _require(holds: bool, rule: str, received: object) -> None:
    if not holds:
        raise ConfigError(rule, repr(received), "Correct this setting.")


def _near(name: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=3)
    return f"Did you mean {' or '.join(matches)}?" if matches else f"Known: {', '.join(known)}."
