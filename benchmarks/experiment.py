"""What a benchmark compares: models, data and budget, as a file that anyone can run again."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.data.corpus import PYTHON_STDLIB
from hylorada_jax.errors import ConfigError, near
from hylorada_jax.structure.code import Domain

BASE, FULL = "base", "full"
NAMES = (BASE, FULL, *METHODS)
INSTALL = 'pip install -e ".[benchmarks]" -c constraints.txt'
# Settings of a contestant that are not its adapter's.
_OWN = ("structure", "learning_rates")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table.

    Attributes:
        label: how the table calls it.
        kind: "base" (nothing is trained), "full" (all is), or "adapter".
        config: of the adapter.
        structure: what a structure encoder reads: "code", or None.
        learning_rates: of which the best is taken.
    """

    label: str
    kind: Literal["base", "full", "adapter"]
    config: HyLoRADAConfig | None
    structure: Domain | None
    learning_rates: tuple[float, ...]

    def settings(self) -> dict[str, Any]:
        """All that decides what it computes, JSON-able."""
        config = None if self.config is None else self.config.to_dict()
        return {"kind": self.kind, "config": config, "structure": self.structure}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Contestants on the same data, tokens and seeds.

    Args:
        name: of its directory of results, and of its table.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        train_data: what is adapted on: a file, a glob, a Hub dataset, or python-stdlib. About 5 % of it is
            held out, by which the learning rate is chosen.
        test_data: what is reported on, and nothing is chosen by; None: half of what is held out.
        methods: {label: settings}: of :class:`HyLoRADAConfig`, the method being the label where none is
            given; or the labels base and full. Further: ``"structure": "code"`` and ``learning_rates``;
            ``"lora_A": "kaiming"`` is short for lora_A_init.
        adapter: settings that every adapter has whose own do not say otherwise.
        learning_rates: the grid that each contestant chooses from, with the first seed; sparse has a rate of
            its own.
        seeds: of the adapters' start and the order of the data.
        epochs: passes over the training data; or
        steps: optimizer steps.
        batch_size: rows per step.
        seq_len: tokens per row, in training and in every measure.
        train_tokens: of the training data, about so many, spread evenly; None takes all.
        dev_tokens: of the held-out data, about so many.
        test_tokens: of the test data, about so many.
        retrieval_samples: facts at each depth of the retrieval probe; 0 leaves it out.
        dtype: of the frozen weights and the computation.

    Raises:
        ConfigError: a value is out of range, a method is unknown, or one of its settings is refused.
    """

    name: str = "benchmark"
    model: str = "smollm2-135m"
    train_data: str = PYTHON_STDLIB
    test_data: str | None = None
    methods: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {name: {} for name in ("lora", "dora", "lorada", "hylorada")}
    )
    adapter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 2
    seq_len: int = 256
    train_tokens: int | None = None
    dev_tokens: int = 4096
    test_tokens: int = 8192
    retrieval_samples: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("learning_rates", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(
                "A name must be one that a directory can have.",
                repr(self.name),
                "Use letters, digits, - and _.",
            )
        if (self.epochs is None) == (self.steps is None):
            received = f"epochs={self.epochs}, steps={self.steps}"
            raise ConfigError("A budget is either epochs or steps.", received, "Give one of the two.")
        for name in ("epochs", "steps", "batch_size", "train_tokens", "dev_tokens", "test_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive.", repr(value), "Correct it.")
        for name in ("learning_rates", "seeds", "methods"):
            require_each_once(name, getattr(self, name))
        _ = self.variants

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The contestants, in the order of the table."""
        return tuple(self._variant(label, dict(settings)) for label, settings in self.methods.items())

    def _variant(self, label: str, settings: dict[str, Any]) -> Variant:
        own = {name: settings.pop(name) for name in _OWN if name in settings}
        name = settings.setdefault("method", label)
        if name not in NAMES:
            raise ConfigError(f"A method is one of {', '.join(NAMES)}.", repr(name), near(str(name), NAMES))
        if own.get("structure", "code") != "code":
            raise ConfigError('Beside the adapter\'s settings: "structure": "code".', own, "Correct it.")
        if "lora_A" in settings:
            settings["lora_A_init"] = settings.pop("lora_A")
        rates = tuple(own.get("learning_rates", self.learning_rates))
        kind: Literal["base", "full", "adapter"] = name if name in (BASE, FULL) else "adapter"
        config = HyLoRADAConfig.from_dict({**self.adapter, **settings}) if kind == "adapter" else None
        if kind == BASE:
            rates = (0.0,)
        if config and config.method == "sparse":
            # All that it trains has a rate of its own: of a grid, every run would be the same.
            from hylorada_jax.training.optimizer import GROUPS

            rates = (GROUPS["sparse"].rate,)
        structure = own.get("structure")
        if structure and not (config and config.use_hylorada_v2):
            received = f"{label}: structure {structure}"
            raise ConfigError("Only hylorada_v2 reads structure.", received, "Leave it out there.")
        return Variant(
            label=label,
            kind=kind,
            config=config,
            structure=structure,
            learning_rates=rates,
        )

    @classmethod
    def load(cls, path: Path, **changes: Any) -> Experiment:
        """The experiment of a JSON file.

        Args:
            path: a JSON object of this class's arguments.
            changes: arguments that take the place of the file's.

        Raises:
            ConfigError: there is no such file, it is no JSON, or an argument is unknown or refused.
        """
        try:
            settings = json.loads(path.read_text("utf-8"))
            known = [field.name for field in dataclasses.fields(cls)]
            unknown = sorted(set(settings) - set(known))
        except (OSError, ValueError, TypeError) as error:
            rule = "An experiment is a JSON object in a file."
            raise ConfigError(
                rule, f"{path}: {error}", "Check the path, or take one of experiments/."
            ) from error
        if unknown:
            remedy = " ".join(near(name, known) for name in unknown)
            raise ConfigError(f"{path} must have known settings.", ", ".join(unknown), remedy)
        if changes.keys() & {"epochs", "steps"}:
            settings = {key: value for key, value in settings.items() if key not in ("epochs", "steps")}
        return cls(**(settings | changes))


def require_each_once(name: str, values: Collection[Any]) -> None:
    """Raises a ConfigError for a list that is empty or names something twice."""
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{name} must be there, each once.", list(values), "Correct the list.")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What of some settings is not as it was when they were written as JSON; empty where all is."""
    now = json.loads(json.dumps(ours))  # a tuple comes back as a list
    return "; ".join(f"{k} {theirs.get(k)!r}, now {now[k]!r}" for k in now if theirs.get(k) != now[k])


def dev_loss(record: Mapping[str, Any]) -> float:
    """The held-out loss of a run, in nats, from its record; infinite where it diverged."""
    return record["result"].get("dev_loss", math.inf)
