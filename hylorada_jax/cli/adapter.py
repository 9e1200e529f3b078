"""The command line's options that say what is trained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hylorada_jax.cli.flags import flag_of, in_flags
from hylorada_jax.config import HyLoRADAConfig, LoraStart, Method
from hylorada_jax.errors import ConfigError

Preset = Literal["recommended", "documented"]
# --daa or --no-daa; without either, what the method implies.
Switch = Annotated[bool | None, tyro.conf.DisallowNone]

# Options whose name is not the setting's.
_SETTINGS = {
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_plus": "lora_plus_enabled",
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "position_bias": "position_bias_enabled",
    "daa": "daa_enabled",
    "sparse": "sparse_enabled",
    "s2_attn": "s2_attn_enabled",
}
# What a method without linear adapters would not read.
_OF_LINEAR = "rank", "alpha", "dropout", "lora_A_init", "lora_A_gain", "lora_plus", "exclude"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is trained.

    Args:
        method: lora, dora, lorada, longlora, sparse, hylorada_v1, hylorada_v2 or hylorada [the preset's;
            recommended is hylorada_v1: it merges into the weights and exports to PEFT, and hylorada's
            additions, a position bias and DAA, gained nothing in our benchmarks].
        preset: starting point that other options modify: recommended, level with the best settings in our
            benchmarks, or documented, those of the method's documents [recommended].
        config: a HyLoRADAConfig as JSON, in place of a preset; options given beside it take precedence.
        rank: rank of the update, r [8].
        alpha: scale of the update, α [2r; with a config file, in the file's ratio to r].
        dropout: probability of dropping inputs of the low-rank path [0; 0.05 with the preset documented].
        lora_A_init: start of lora_A, orthogonal or kaiming [kaiming for lora, dora, lorada, longlora].
        lora_A_gain: factor of lora_A's start [recommended: 0.577 for an orthogonal one, else 1].
        lora_plus: train lora_B at ten times the rate of lora_A [off; on with the preset documented].
        targets: layer names, regular expressions, or all-linear [the attention projections].
        exclude: layer names or regular expressions to leave out.
        position_bias: scale the update by a learned function of the position; on with the method hylorada.
        daa: direct attention adaptation: a scale and a shift of every head's logits.
        daa_position_bias: with --daa, a learned bias for every distance.
        sparse: a sparse adapter after every MLP block; on with the method sparse and the preset documented.
        s2_attn: shifted sparse attention, in training only.
        train_embeddings: train the embeddings themselves.
        train_norms: train the norms themselves.
    """

    method: Method | None = None
    preset: Preset | None = None
    config: Path | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    lora_A_init: LoraStart | None = None  # noqa: N815
    lora_A_gain: float | None = None  # noqa: N815
    lora_plus: Switch = None
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    position_bias: Switch = None
    daa: Switch = None
    daa_position_bias: Switch = None
    sparse: Switch = None
    s2_attn: Switch = None
    train_embeddings: Switch = None
    train_norms: Switch = None

    def build(self) -> HyLoRADAConfig:
        """The config of these options, on the preset or the file's where one is given.

        Raises:
            ConfigError: a setting is refused, the file is absent, both name a method, or it is given beside a
                preset.
        """
        given: dict[str, Any] = {
            _SETTINGS.get(name, name): value for name, value in vars(self).items() if value is not None
        }
        preset, file = given.pop("preset", None), given.pop("config", None)
        if file is None:
            if preset is None and self.method is None:
                # The switches choose the method: hylorada_v1, or with --position-bias hylorada.
                given = {"method": None, "use_hylorada": True} | given
            return self._checked(lambda: HyLoRADAConfig.preset(preset or "recommended", **given))
        for name, value in (("method", self.method), ("preset", preset)):
            if value is not None:
                received = f"--config {file} --{name} {value}"
                raise ConfigError("A config file names its method and settings.", received, "Give one.")
        start = HyLoRADAConfig.load(file)
        if self.rank is not None and self.alpha is None:
            # α follows r where only r is given, so that the update's scale stays the same.
            given["lora_alpha"] = start.lora_alpha / start.lora_rank * self.rank
        return self._checked(lambda: dataclasses.replace(start, **given))

    def _checked(self, build: Callable[[], HyLoRADAConfig]) -> HyLoRADAConfig:
        """A config; a ConfigError calls settings that are refused by their options."""
        try:
            config = build()
        except ConfigError as error:
            raise in_flags(error, {_SETTINGS.get(n, n): flag_of(n) for n in vars(self)}) from None
        if config.linear is None and (idle := [n for n in _OF_LINEAR if getattr(self, n) is not None]):
            raise ConfigError(
                f"--method {config.method} has no low-rank update.",
                ", ".join(flag_of(name) for name in idle),
                "Leave that out, or choose a method with one and add --sparse.",
            )
        return config


# A group of the help, without a prefix: --rank, not --adapter.rank.
Adapter = tyro.conf.OmitArgPrefixes[AdapterOptions]
DEFAULTS = AdapterOptions()
