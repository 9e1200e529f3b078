"""The settings of a HyLoRADA adapter, shared by the JAX and the PyTorch package.

Imports neither jax nor torch, so that either package can read it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

from hylorada_jax.errors import ConfigError, near, require_one_of
from hylorada_jax.exact import fraction, plain_number
from hylorada_jax.io.files import user_path
from hylorada_jax.io.reading import read_json
from hylorada_jax.leaves import Kind, lora_a_start
from hylorada_jax.text import parse_json, shown

QV = ("q", "v")
QKVO = ("q", "k", "v", "o")

Method = Literal["lora", "dora", "lorada", "longlora", "sparse", "hylorada_v1", "hylorada_v2", "hylorada"]
# What each named method switches on. "roles" are the attention projections it adapts by default.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"roles": QV},
    "dora": {"roles": QKVO, "use_dora": True},
    "lorada": {"roles": QKVO, "daa_enabled": True},
    "longlora": {"roles": QKVO, "s2_attn_enabled": True, "train_embeddings": True, "train_norms": True},
    "sparse": {"roles": (), "sparse_enabled": True},
    "hylorada_v1": {"roles": QKVO, "use_hylorada": True},
    "hylorada_v2": {"roles": QKVO, "use_hylorada": True, "use_hylorada_v2": True},
    "hylorada": {
        "roles": QKVO,
        "use_hylorada": True,
        "position_bias_enabled": True,
        "daa_enabled": True,
        "daa_position_bias": True,
    },
}

# The rule of every refusal of structure.
READS_STRUCTURE = "Structure is read by the structure encoder, which only method hylorada_v2 has."

_SWITCHES = (
    "use_dora",
    "use_hylorada",
    "use_hylorada_v2",
    "position_bias_enabled",
    "daa_enabled",
    "daa_position_bias",
    "sparse_enabled",
    "s2_attn_enabled",
    "train_embeddings",
    "train_norms",
)
# Which linear layer a method has is part of its name, so these may not contradict it.
_LINEAR_SWITCHES = _SWITCHES[:3]
# Of a group of shifted attention, in tokens: the shift is a whole number of them.
_MAX_SHIFT_UNIT = 1024

# Beyond any real use, and such that what a stranger's file asks for stays bearable.
MAX_SIZE = 2**16
MAX_NUMBER = 1e6
# Of one setting, and their characters in all: the layers of the largest models, named one by one.
MAX_PATTERNS, MAX_PATTERN_LENGTH = 2000, 100_000
_SIZES = {
    "lora_rank": MAX_SIZE,
    "sparse_adapter_dim": MAX_SIZE,
    "s2_group_size": MAX_SIZE,
    "structure_dim": MAX_SIZE,
    "structure_seq_len": 2**30,
}

TRAINING_ONLY = frozenset({
    "lora_dropout", "lora_A_init", "lora_A_gain", "gate_init", "residual_init", "detach_norm",
    "lora_plus_enabled", "lora_plus_ratio", "sparse_temperature", "sparse_dropout", "s2_attn_enabled",
    "s2_group_size", "s2_shift_ratio",
})  # fmt: skip
"""What an adapter starts from and trains by: a trained one computes the same whatever they are."""

RANK_STRATEGIES = ("uniform", "importance", "decreasing")
STRUCTURE_ENCODERS = ("default", "temporal")
LoraStart = Literal["orthogonal", "kaiming"]

# α is 2r in each.
PRESETS: dict[str, dict[str, Any]] = {
    # What was best of what docs/choosing.md measures; the gain is that of a start with orthogonal rows.
    "recommended": {"method": "hylorada_v1", "lora_rank": 8, "lora_A_gain": 0.577},
    "efficient": {"lora_rank": 4, "target_modules": QV},
    "balanced": {"lora_rank": 8},
    "quality": {"lora_rank": 16, "target_modules": ("all-linear",)},
    # The hyperparameters that the method's documents recommend. The method brings the position bias and DAA.
    "documented": {
        "method": "hylorada",
        "lora_rank": 8,
        "lora_dropout": 0.05,
        "lora_plus_enabled": True,
        "lora_plus_ratio": 10.0,
        "gate_init": 0.0,
        "residual_init": 0.1,
        "sparse_enabled": True,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyLoRADAConfig:
    """What is adapted, by which layer, and at which rates.

    A switch left at None takes the value that ``method`` implies; after construction every switch is a
    bool. Without a method, the switches choose it: ``use_hylorada_v2`` gives ``hylorada_v2``, ``use_dora``
    gives ``dora``, ``use_hylorada=False`` gives ``lora``, ``use_hylorada=True`` gives ``hylorada_v1`` (with
    ``position_bias_enabled=True`` ``hylorada``), and nothing at all gives ``hylorada``.

    Settings may come from a stranger's file, so all are bounded: ranks and widths by 65,536,
    structure_seq_len by 2³⁰, other numbers by a million, the patterns of one setting by 2,000 of together
    100,000 characters.

    Args:
        method: lora, dora, lorada, longlora, sparse, hylorada_v1, hylorada_v2 or hylorada. For another one
            make a new config: ``dataclasses.replace`` passes on the switches that the old method implied.
        use_dora: adapt by :class:`DoRALinear`.
        use_hylorada: adapt by :class:`HyLoRADALinear` or one of its extensions.
        use_hylorada_v2: scale the update by a structure prior.
        lora_rank: r, the rank of the update, ≥ 1.
        lora_alpha: α; the update is scaled by α/r. 16 whatever the rank; a preset makes it 2r, and so do the
            commands.
        lora_dropout: probability in [0, 1) of dropping an input of the low-rank path in training.
        use_rslora: scale by α/√r instead (Kalajdzievski 2023).
        lora_A_init: the start of lora_A: orthogonal or kaiming. None: kaiming for LoRA and DoRA, else
            orthogonal.
        lora_A_gain: multiplies the initial lora_A, > 0.
        rank_strategy: uniform; importance (smaller ranks in the middle); decreasing (smaller with depth).
        rank_pattern: {layer name or regular expression: its rank}; the first that matches a layer wins over
            ``rank_strategy``. α keeps its ratio to r.
        alpha_pattern: {layer name or regular expression: its α}, overriding that ratio.
        target_modules: layer names, regular expressions over full names, or "all-linear"; None takes the
            attention projections the method names. The roles q, k, v and o stand for the model's own
            names of these projections.
        exclude_modules: names or regular expressions to leave out again.
        gate_init: initial magnitude_gate; g = σ(gate_init).
        residual_init: initial residual_weight; β = σ(residual_init).
        detach_norm: stop the gradient at ‖W + sBA‖. None: True for DoRA (its paper, §4.3), else False.
        magnitude_scales_bias: let the column scale act on the layer's bias too.
        lora_plus_enabled: train lora_B at ``lora_plus_ratio`` times the rate of lora_A (LoRA+).
        lora_plus_ratio: that ratio, > 0; read with ``lora_plus_enabled`` only.
        position_bias_enabled: scale the update by a learned function of the position.
        daa_enabled: direct attention adaptation, S' = α·S + β on the logits of every self-attention.
        daa_per_head: one α and β per head; otherwise one for all heads of a layer.
        daa_position_bias: add a learned bias for each bucket of distances, and head (PositionalDAA).
        sparse_enabled: a sparse adapter after every MLP block.
        sparse_adapter_dim: hidden units of that adapter, ≥ 1.
        sparse_topk_ratio: the part of them in (0, 1] that the gate leaves on; at least one stays on.
        sparse_temperature: τ of the gate's straight-through gradient, > 0.
        sparse_dropout: probability in [0, 1) of dropping one of the units in training.
        s2_attn_enabled: shifted sparse attention in training; evaluation and generation attend in full.
        s2_group_size: G, tokens per group; None: a quarter of the row, as LongLoRA has it.
        s2_shift_ratio: half of the heads see groups shifted by this part of G, in (0, 1): k/n with n ≤ 1,024.
        train_embeddings: train the token (and position) embeddings themselves.
        train_norms: train the norms themselves.
        structure_dim: width of the structure prior.
        structure_encoder_type: default or temporal.
        structure_seq_len: the length whose middle the encoder counts positions from. Constant, so that later
            tokens do not change the prior of earlier ones.

    Raises:
        ConfigError: a value is out of range, unknown, or contradicts another.

    Example:
        >>> config = HyLoRADAConfig(lora_rank=8)
        >>> config.method, config.position_bias_enabled, config.daa_position_bias, config.sparse_enabled
        ('hylorada', True, True, False)
        >>> HyLoRADAConfig(lora_rank=8, lora_alpha=16.0, use_hylorada=True).method
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
    lora_A_init: str | None = None  # noqa: N815
    lora_A_gain: float = 1.0  # noqa: N815
    rank_strategy: str = "uniform"
    rank_pattern: Mapping[str, int] | Iterable[tuple[str, int]] = ()
    alpha_pattern: Mapping[str, float] | Iterable[tuple[str, float]] = ()
    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] = ()
    gate_init: float = 0.0
    residual_init: float = 0.1
    detach_norm: bool | None = None
    magnitude_scales_bias: bool = False
    lora_plus_enabled: bool = False
    lora_plus_ratio: float = 10.0
    position_bias_enabled: bool | None = None
    daa_enabled: bool | None = None
    daa_per_head: bool = True
    daa_position_bias: bool | None = None
    sparse_enabled: bool | None = None
    sparse_adapter_dim: int = 128
    sparse_topk_ratio: float = 0.1
    sparse_temperature: float = 1.0
    sparse_dropout: float = 0.0
    s2_attn_enabled: bool | None = None
    s2_group_size: int | None = None
    s2_shift_ratio: float = 0.5
    train_embeddings: bool | None = None
    train_norms: bool | None = None
    structure_dim: int = 32
    structure_encoder_type: str = "default"
    structure_seq_len: int = 2048

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._set(field.name, plain_number(getattr(self, field.name)))
        for name, limit in _SIZES.items():
            value = getattr(self, name)
            if not (value is None and name == "s2_group_size"):
                _require(_is_size(value, limit), f"{name} must be an integer from 1 to {limit:,}.", value)
        if self.target_modules is not None:
            self._set("target_modules", _names("target_modules", self.target_modules))
        self._set("exclude_modules", _names("exclude_modules", self.exclude_modules))
        # As pairs, so that a config can be hashed.
        self._set("rank_pattern", _pattern("rank_pattern", self.rank_pattern, _is_size))
        self._set("alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _is_positive))
        for field in dataclasses.fields(self):
            if field.type == "float":
                self._set(field.name, _number(field.name, getattr(self, field.name)))
        self._resolve_method()
        if self.detach_norm is None:
            self._set("detach_norm", bool(self.use_dora))
        self._check()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_method(self) -> None:
        if self.method is None:
            self._set("method", self._method_of_switches())
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ConfigError(
                f"method must be one of {', '.join(METHODS)}.", shown(self.method), near(self.method, METHODS)
            )
        implied = METHODS[self.method]
        for name in _SWITCHES:
            given, default = getattr(self, name), implied.get(name, False)
            if given is not None and not isinstance(given, bool):
                raise ConfigError(f"{name} must be True, False or None.", shown(given), "Give a bool.")
            if name in _LINEAR_SWITCHES and given not in (None, default):
                raise ConfigError(
                    f"{name} must agree with the method: {self.method!r} has {name}={default}.",
                    given,
                    f"Leave {name} out, or choose another method.",
                )
            if name == "daa_position_bias" and not self.daa_enabled:
                default = False  # switched off, DAA takes its part along
            self._set(name, default if given is None else given)

    def _method_of_switches(self) -> str:
        if self.use_hylorada_v2:
            return "hylorada_v2"
        if self.use_dora:
            return "dora"
        if self.use_hylorada is False:
            return "lora"
        return "hylorada_v1" if self.use_hylorada and not self.position_bias_enabled else "hylorada"

    def _check(self) -> None:
        _require(self.lora_alpha > 0, "lora_alpha must be > 0.", self.lora_alpha)
        check_dropout(self.lora_dropout, "lora_dropout")
        check_lora_a(self.lora_A_init, self.lora_A_gain)
        _require(self.lora_plus_ratio > 0, "lora_plus_ratio must be > 0.", self.lora_plus_ratio)
        _require(
            0 < self.sparse_topk_ratio <= 1, "sparse_topk_ratio must be in (0, 1].", self.sparse_topk_ratio
        )
        _require(self.sparse_temperature > 0, "sparse_temperature must be > 0.", self.sparse_temperature)
        check_dropout(self.sparse_dropout, "sparse_dropout")
        _require(0 < self.s2_shift_ratio < 1, "s2_shift_ratio must be in (0, 1).", self.s2_shift_ratio)
        if fraction(self.s2_shift_ratio).denominator > _MAX_SHIFT_UNIT:
            near_ratio = fraction(self.s2_shift_ratio).limit_denominator(_MAX_SHIFT_UNIT)
            raise ConfigError(
                f"s2_shift_ratio must be a fraction k/n, n ≤ {_MAX_SHIFT_UNIT}, for a shift of whole tokens.",
                self.s2_shift_ratio,
                f"Take {near_ratio}, {float(near_ratio)}.",
            )
        if self.s2_group_size is not None:
            self.s2_groups(1)
        for field in dataclasses.fields(self):
            if field.type == "bool" or field.name == "detach_norm":
                value = getattr(self, field.name)
                _require(isinstance(value, bool), f"{field.name} must be a bool.", value)
        for name, allowed in (
            ("rank_strategy", RANK_STRATEGIES),
            ("structure_encoder_type", STRUCTURE_ENCODERS),
        ):
            require_one_of(name, getattr(self, name), allowed)
        if self.position_bias_enabled and (self.use_hylorada_v2 or not self.use_hylorada):
            raise ConfigError(
                "position_bias_enabled scales the update of method='hylorada' or 'hylorada_v1'.",
                f"method={self.method!r}, position_bias_enabled=True",
                "Choose one of them, or leave position_bias_enabled out.",
            )
        if self.daa_position_bias and not self.daa_enabled:
            raise ConfigError(
                "daa_position_bias is a part of direct attention adaptation.",
                f"daa_position_bias=True, daa_enabled={self.daa_enabled}",
                "Set daa_enabled=True too, or leave daa_position_bias out.",
            )
        for name in ("target_modules", "rank_pattern", "alpha_pattern") if self.method == "sparse" else ():
            if given := getattr(self, name):
                raise ConfigError(
                    "method='sparse' adapts no linear layer.",
                    f"{name}={shown(given)}",
                    "Choose a method with a linear adapter and set sparse_enabled=True.",
                )

    @property
    def linear(self) -> Kind | None:
        """The linear adapter's kind; None where the method has none."""
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

    def s2_groups(self, seq_len: int) -> tuple[int, int]:
        """The group size G of shifted sparse attention and the shift, in tokens.

        Args:
            seq_len: tokens per row; read where ``s2_group_size`` is None, which takes a quarter of it,
                rounded up to where the shift is a whole number.

        Returns:
            (G, shift_ratio·G).

        Raises:
            ConfigError: the shift is not a whole number of tokens, at least one.

        Example:
            >>> HyLoRADAConfig(method="longlora").s2_groups(256)
            (64, 32)

        Source: Chen et al. 2024 (LongLoRA), §3.2.
        """
        ratio = fraction(self.s2_shift_ratio)
        unit = ratio.denominator
        size = unit * -(-seq_len // (4 * unit)) if self.s2_group_size is None else self.s2_group_size
        if size < 1 or size % unit:
            raise ConfigError(
                f"s2_group_size must be a positive multiple of {unit}, so that s2_shift_ratio={ratio} of it "
                "is a whole number of tokens.",
                size,
                f"Take {unit * max(1, round(size / unit))}, or another s2_shift_ratio.",
            )
        return size, int(size * ratio)

    @property
    def depends_on_token(self) -> bool:
        """Whether an update depends on its token's position or structure.

        Example:
            >>> [HyLoRADAConfig(method=name).depends_on_token for name in ("hylorada_v1", "hylorada")]
            [False, True]
        """
        return bool(self.position_bias_enabled or self.use_hylorada_v2)

    def scale(self, rank: int, alpha: float) -> float:
        """s of a layer: α/r or, with rsLoRA, α/√r.

        Args:
            rank: the layer's own rank, r.
            alpha: its own α.

        Returns:
            s, as a Python float.
        """
        return update_scale(rank, alpha, self.use_rslora)

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
            t = Fraction(2 * min(layer, num_layers - 1 - layer), num_layers)
        else:
            t = Fraction(layer, num_layers - 1)
        return max(min(2, self.lora_rank), math.floor(self.lora_rank * (1 - t / 2)))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in settings.items():
            if name in ("rank_pattern", "alpha_pattern"):
                settings[name] = dict(value)
            elif isinstance(value, tuple):
                settings[name] = list(value)
        return settings

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
            received = ", ".join(f"{shown(name)}: {shown(settings[name])}" for name in unknown[:8])
            remedy = " ".join(dict.fromkeys(near(name, known) for name in unknown[:8]))
            raise ConfigError("Every key must be a setting of HyLoRADAConfig.", received, remedy)
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> HyLoRADAConfig:
        """The config of a JSON text.

        Raises:
            ConfigError: the text is not a JSON object of settings.
        """
        try:
            settings = parse_json(text)
        except ValueError as error:
            raise ConfigError(
                "A config must be JSON.", error, "Write it with HyLoRADAConfig.to_json()."
            ) from error
        if not isinstance(settings, dict):
            raise ConfigError(
                "A config must be a JSON object.", type(settings).__name__, "Write it with to_json()."
            )
        return cls.from_dict(settings)

    @classmethod
    def load(cls, path: str | Path) -> HyLoRADAConfig:
        """The config of a JSON file in UTF-8; a ConfigError where there is none at ``path``."""
        rule = "A config file must be a JSON object of settings, in UTF-8."
        return cls.from_dict(read_json(user_path(path), rule, ConfigError, "Check the path and the file."))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> HyLoRADAConfig:
        """A ready choice, α being 2r.

        recommended is what the commands use: hylorada_v1 without LoRA+, whose A starts with orthogonal rows
        as long as Kaiming's, 1/√3. efficient (r = 4 on q, v), balanced (r = 8) and quality (r = 16, all
        linear layers) are sizes, for any method. documented is the table of hyperparameters of the method's
        documents: r = 8, dropout 0.05, LoRA+ of ratio 10, gate_init 0, residual_init 0.1, with position bias,
        DAA and sparse adapters.

        Args:
            name: recommended, efficient, balanced, quality or documented.
            settings: further settings; they win over the preset's.

        Raises:
            ConfigError: no preset has that name, or a setting is refused.

        Example:
            >>> HyLoRADAConfig.preset("quality", method="dora").lora_rank
            16
        """
        if name not in PRESETS:
            raise ConfigError(f"A preset is one of {', '.join(PRESETS)}.", repr(name), near(name, PRESETS))
        preset = PRESETS[name] | settings
        if settings.get("method") == "sparse" and "target_modules" not in settings:
            preset.pop("target_modules", None)  # it has no linear adapters to target
        if _is_size(preset["lora_rank"]):
            preset.setdefault("lora_alpha", 2.0 * preset["lora_rank"])
        config = cls.from_dict(preset)
        start = lora_a_start(config.linear, config.lora_A_init)
        if "lora_A_gain" not in settings and start != "orthogonal":
            # A preset's gain is for orthogonal rows; Kaiming's have that length.
            return dataclasses.replace(config, lora_A_gain=1.0)
        return config


def update_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """s = α/r or, with rsLoRA, α/√r."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def check_linear_layer(layer: str, in_features: int, out_features: int, rank: int, alpha: float) -> None:
    """Refuse sizes and an α that no linear adapter can have; the layers of both packages ask.

    Args:
        layer: its class's name, for the error.
        in_features: d_in.
        out_features: d_out.
        rank: r.
        alpha: α.

    Raises:
        ConfigError: saying which.
    """
    sizes = in_features, out_features, rank
    if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
        raise ConfigError(
            f"{layer}: in_features, out_features and rank are whole numbers ≥ 1.",
            ", ".join(map(repr, sizes)),
            "Give the sizes of the frozen layer, and a rank of 1 or more.",
        )
    _require(math.isfinite(alpha) and alpha > 0, f"{layer}: alpha must be finite and > 0.", alpha)


def check_lora_a(init: object, gain: object) -> None:
    """Refuse a start of lora_A that there is not; the layers of both packages ask too.

    Args:
        init: lora_A_init.
        gain: lora_A_gain.

    Raises:
        ConfigError: saying which.
    """
    if init is not None and init not in (starts := get_args(LoraStart)):
        rule = f"lora_A_init must be one of {', '.join(starts)}, or None."
        raise ConfigError(rule, shown(init), near(init, starts))
    _require(_is_positive(gain), f"lora_A_gain must be > 0, and at most {MAX_NUMBER:,.0f}.", gain)


def check_dropout(value: float, name: str = "dropout") -> None:
    """Refuse what is no probability of dropping a number; the layers of both packages ask too.

    Args:
        value: the probability.
        name: of the setting.

    Raises:
        ConfigError: it is not in [0, 1).
    """
    _require(0 <= value < 1, f"{name} must be in [0, 1).", value)


def _names(name: str, value: object) -> tuple[str, ...]:
    several = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    names: tuple[Any, ...] = tuple(value) if several else (value,)  # type: ignore[arg-type]
    if not all(_is_name(item) for item in names) or (not names and name == "target_modules"):
        raise ConfigError(
            f"{name} must be non-empty strings.", shown(value), 'For example ("q_proj", "v_proj").'
        )
    _check_length(name, names)
    return names


def _pattern(name: str, value: object, is_valid: Callable[[Any], bool]) -> tuple[tuple[str, Any], ...]:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        pairs = tuple(dict(value).items())  # type: ignore[call-overload]
    except (TypeError, ValueError):
        pairs = (("", 0),)
    if wrong := [pair for pair in pairs if not (_is_name(pair[0]) and is_valid(pair[1]))]:
        kind = (
            f"ranks, 1 … {MAX_SIZE:,}" if name == "rank_pattern" else f"numbers > 0, up to {MAX_NUMBER:,.0f}"
        )
        received = shown(dict(wrong)) if pairs[0][0] else shown(value)
        raise ConfigError(f"{name} must map layer names to {kind}.", received, 'For example {"v_proj": 4}.')
    _check_length(name, [pattern for pattern, _ in pairs])
    return pairs


def _check_length(name: str, patterns: Sequence[str]) -> None:
    if len(patterns) > MAX_PATTERNS or sum(map(len, patterns)) > MAX_PATTERN_LENGTH:
        raise ConfigError(
            f"{name} must be at most {MAX_PATTERNS:,} patterns, of {MAX_PATTERN_LENGTH:,} characters in all.",
            f"{len(patterns):,} of {sum(map(len, patterns)):,}",
            "Say it with fewer regular expressions.",
        )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_size(value: object, limit: int = MAX_SIZE) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _number(name: str, value: object) -> float:
    _require(
        _is_number(value), f"{name} must be a number between -{MAX_NUMBER:,.0f} and {MAX_NUMBER:,.0f}.", value
    )
    return float(value)  # type: ignore[arg-type]


def _require(holds: bool, rule: str, received: object) -> None:
    if not holds:
        raise ConfigError(rule, shown(received), "Correct this setting.")
