"""What time_series.py compares: settings, methods and the budget."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from benchmarks.experiment import require_each_once
from benchmarks.series.data import target_series, thinned
from benchmarks.series.tokens import Hours, Prepared, boundaries, prepare
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.packing import Rows
from hylorada_jax.errors import ConfigError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.training.config import TrainingConfig


class Setting(NamedTuple):
    """What is predicted from what.

    Attributes:
        label: how the table calls it.
        series: co2 or elnino.
        context: values that a prediction sees.
        kept: part of the times that are there; others are dropped at random.
    """

    label: str
    series: str
    context: int
    kept: float = 1.0


# Few contexts, for each is a program to compile for every method.
SHORT, LONG = 6, 52
SETTINGS = {
    "co2-short": Setting(f"CO2, {SHORT} weeks", "co2", SHORT),
    "co2-long": Setting(f"CO2, {LONG} weeks", "co2", LONG),
    "co2-irregular": Setting(f"CO2, half of the weeks, {SHORT} values", "co2", SHORT, kept=0.5),
    "elnino-short": Setting(f"El Niño, {SHORT} months", "elnino", SHORT),
    "elnino-long": Setting(f"El Niño, {LONG} months", "elnino", LONG),
}


class Method(NamedTuple):
    """A way to adapt.

    Attributes:
        name: of the method in :class:`HyLoRADAConfig`.
        hours: what the structure encoder reads, as for :func:`hours_of`.
        irregular_only: with regular times it is another row of the table, but for a phase that is learned.
    """

    name: str
    hours: Hours | None = None
    irregular_only: bool = False


METHODS = {
    "lora": Method("lora"),
    "hylorada_v1": Method("hylorada_v1"),
    "hylorada_v2, no hours": Method("hylorada_v2"),
    "hylorada_v2, hours": Method("hylorada_v2", "own"),
    "hylorada_v2, hours of the year": Method("hylorada_v2", "year"),
    "hylorada_v2, hours asked for": Method("hylorada_v2", "asked", irregular_only=True),
}
BASE = "base, not adapted"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is computed.

    Args:
        settings: of ``SETTINGS``.
        seeds: of the base's weights, of the adapters' start and of the order of the data.
        learning_rates: the grid that each method chooses from, with the first seed.
        pretrain_steps: optimizer steps on the other series.
        pretrain_rate: learning rate of those.
        steps: optimizer steps of an adaptation.
        batch_size: rows per step.
        bins: tokens.
        hidden_size: of the base.
        layers: of the base.
        rank: of the adapters.
        max_grad_norm: to which gradients are clipped. Those of the encoder's periods and frequencies grow
            with the hours, and take their share from all others.

    Raises:
        ConfigError: a value is out of range, or a setting is unknown.
    """

    settings: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    pretrain_steps: int = 600
    pretrain_rate: float = 3e-3
    steps: int = 200
    batch_size: int = 8
    bins: int = 32
    hidden_size: int = 64
    layers: int = 2
    rank: int = 2
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("settings", "seeds", "learning_rates"):
            require_each_once(name, getattr(self, name))
        if unknown := [name for name in self.settings if name not in SETTINGS]:
            raise ConfigError(f"A setting is one of {', '.join(SETTINGS)}.", unknown, "Choose of these.")
        for name in ("pretrain_steps", "steps", "batch_size", "layers", "rank", "bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive.", getattr(self, name), "Correct it.")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ConfigError(
                "hidden_size must be a multiple of 8: four heads of even width.",
                self.hidden_size,
                "Correct it.",
            )

    def decoder(self) -> DecoderConfig:
        """The shape of a base."""
        return DecoderConfig.from_hf(
            {
                "model_type": "llama",
                "vocab_size": self.bins,
                "hidden_size": self.hidden_size,
                "intermediate_size": 2 * self.hidden_size,
                "num_hidden_layers": self.layers,
                "num_attention_heads": 4,
                "max_position_embeddings": LONG,
                "tie_word_embeddings": False,
                # HF's 0.02 is made for widths of thousands.
                "initializer_range": self.hidden_size**-0.5,
            }
        )

    def training(self, rows: Rows, *, steps: int, rate: float, seed: int) -> TrainingConfig:
        """How a base or an adapter is trained on some rows."""
        return TrainingConfig(
            output=".",  # nothing is written
            steps=steps,
            batch_size=self.batch_size,
            seq_len=rows[0]["input_ids"].size,
            learning_rate=rate,
            max_grad_norm=self.max_grad_norm,
            seed=seed,
        )


def prepared_of(setting: Setting, bins: int) -> Prepared:
    """The tokens of a setting, divided by time.

    Args:
        setting: whose.
        bins: number of tokens.
    """
    series = target_series()[setting.series]
    # Divided at the same times, whether values are dropped or not. The seed is part of the data set.
    return prepare(thinned(series, setting.kept, seed=0), bins, *boundaries(series))


def adapter(method: Method, rank: int, context: int) -> HyLoRADAConfig:
    """What a method trains.

    Args:
        method: which.
        rank: of its update.
        context: from whose middle positions count where there are no hours.
    """
    return HyLoRADAConfig(
        method=method.name,
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        target_modules="all-linear",  # the same layers for every method
        structure_encoder_type="temporal",
        structure_seq_len=context,
    )
