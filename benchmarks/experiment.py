"""What a benchmark compares: models, data and budgets, as a file that anyone can run again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec

from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.data.corpus import PYTHON_STDLIB
from hylorada_jax.errors import ConfigError, near
from hylorada_jax.structure.code import Domain

BASE, FULL = "base", "full"
NAMES = (BASE, FULL, *METHODS)
INSTALL = 'pip install -e ".[benchmarks]" -c constraints.txt'
# Settings of a row that are not its adapter's.
_OWN = ("structure", "grid")
_ADAPTER = [field.name for field in dataclasses.fields(HyLoRADAConfig) if field.name != "method"]
# Those of TrainingConfig that are not a budget, the same for all.
_TRAINING = ("learning_rate", "schedule", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with a value for each setting that is searched.

    Attributes:
        point: these values, by name.
        config: of the adapter; None where there is none.
    """

    point: Mapping[str, Any]
    config: HyLoRADAConfig | None

    @property
    def training(self) -> dict[str, Any]:
        """Those of the values that are arguments of TrainingConfig."""
        return {name: value for name, value in self.point.items() if name in _TRAINING}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table.

    Attributes:
        label: how the table calls it.
        kind: "base" (nothing is trained), "full" (all is), or "adapter".
        structure: what a structure encoder reads: "code", or None.
        candidates: of which the best is taken.
    """

    label: str
    kind: Literal["base", "full", "adapter"]
    structure: Domain | None
    candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Methods on the same data, tokens and seeds, each with the settings that are best for it.

    Args:
        name: of its directory of results, and of its table.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        train_data: what is adapted on: a file, a glob, a Hub dataset, python-stdlib or python-docstrings.
            About 5 % of it is held out, by which settings are chosen.
        test_data: what is reported on, and nothing is chosen by; None: half of what is held out.
        other_data: data of another kind, whose held-out part shows what is forgotten; None leaves it out.
        methods: {label: settings}: of :class:`HyLoRADAConfig`, the method being the label where none is
            given; or the labels base and full. Further: ``"structure": "code"``, and a ``grid``, whose
            settings are added to those of all or take their place.
        adapter: settings that every adapter has whose own do not say otherwise.
        grid: {setting: values}, of :class:`HyLoRADAConfig` and :class:`TrainingConfig`: each method is
            tried with each combination. The weights alone train in full, so only the latter are tried there;
            sparse has a learning rate of its own.
        keep: at each budget, the part of a method's combinations that goes on to the next (successive
            halving).
        seeds: of the adapters' start and the order of the data. Combinations are tried with the first.
        epochs: passes over the training data; or
        steps: optimizer steps; several are budgets, each with runs of its own.
        batch_size: rows per step.
        seq_len: tokens per row, in training and in every measure.
        train_tokens: of the training data, about so many, spread evenly; None takes all.
        dev_tokens: of the held-out data, about so many; as many of other_data.
        test_tokens: of the test data, about so many.
        retrieval_samples: facts at each depth of the retrieval probe; 0 leaves it out.
        report_on: "all" runs the test data is measured, or of each search "chosen" ones alone: at the smaller
            budgets the measures take as long as the training.
        dtype: of the frozen weights and the computation.

    Raises:
        ConfigError: a value is out of range, a method is unknown, or one of its settings is refused.

    Source: successive halving is Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification".
    """

    name: str = "benchmark"
    model: str = "smollm2-135m"
    train_data: str = PYTHON_STDLIB
    test_data: str | None = None
    other_data: str | None = None
    methods: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {name: {} for name in ("lora", "dora", "lorada", "hylorada")}
    )
    adapter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(
        default_factory=lambda: {"learning_rate": (5e-4, 1e-3, 2e-3)}
    )
    keep: float = 1 / 3
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float | None = None
    steps: tuple[int, ...] | None = None
    batch_size: int = 2
    seq_len: int = 256
    train_tokens: int | None = None
    dev_tokens: int = 4096
    test_tokens: int = 8192
    retrieval_samples: int = 0
    report_on: Literal["all", "chosen"] = "all"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.steps is not None:
            steps = self.steps if isinstance(self.steps, list | tuple) else (self.steps,)
            object.__setattr__(self, "steps", tuple(steps))
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(
                "A name must be one that a directory can have.",
                repr(self.name),
                "Use letters, digits, - and _.",
            )
        if (self.epochs is None) == (self.steps is None):
            received = f"epochs={self.epochs}, steps={self.steps}"
            raise ConfigError("A budget is either epochs or steps.", received, "Give one of the two.")
        for name in ("epochs", "batch_size", "train_tokens", "dev_tokens", "test_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive.", repr(value), "Correct it.")
        if self.report_on not in ("all", "chosen"):
            raise ConfigError('report_on must be "all" or "chosen".', repr(self.report_on), "Correct it.")
        if not 0 < self.keep <= 1:
            raise ConfigError("keep must be in (0, 1].", repr(self.keep), "Give a part, as 0.5.")
        for name in ("seeds", "methods"):
            require_each_once(name, getattr(self, name))
        if self.steps is not None:
            require_each_once("steps", self.steps)
            if list(self.steps) != sorted(self.steps):
                raise ConfigError("steps must grow.", list(self.steps), "Put the smallest budget first.")
        if list(self.seeds) != sorted(self.seeds):  # a table reads off the least what was searched
            raise ConfigError("seeds must grow: the first is searched with.", list(self.seeds), "Sort them.")
        _ = self.variants

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The rows of the table, in their order."""
        return tuple(self._variant(label, dict(settings)) for label, settings in self.methods.items())

    def _variant(self, label: str, settings: dict[str, Any]) -> Variant:
        own = {name: settings.pop(name) for name in _OWN if name in settings}
        name = settings.setdefault("method", label)
        if name not in NAMES:
            raise ConfigError(f"A method is one of {', '.join(NAMES)}.", repr(name), near(str(name), NAMES))
        if own.get("structure", "code") != "code":
            raise ConfigError('Beside the adapter\'s settings: "structure": "code".', own, "Correct it.")
        kind: Literal["base", "full", "adapter"] = name if name in (BASE, FULL) else "adapter"
        grid = {**self.grid, **own.get("grid", {})}
        for searched, values in grid.items():
            if searched not in (*_ADAPTER, *_TRAINING):
                known = (*_ADAPTER, *_TRAINING)
                raise ConfigError(
                    "A grid must have settings of adapters or training.",
                    repr(searched),
                    near(searched, known),
                )
            require_each_once(f"The values of {searched}", values)
        if kind != "adapter":
            grid = {key: values for key, values in grid.items() if kind == FULL and key in _TRAINING}
        elif name == "sparse":
            # All that it trains has a rate of its own: of a grid, every run would be the same.
            from hylorada_jax.training.optimizer import GROUPS

            grid["learning_rate"] = (GROUPS["sparse"].rate,)
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        candidates = tuple(self._candidate(kind, settings, point) for point in points)
        config = candidates[0].config
        structure = own.get("structure")
        if structure and not (config and config.use_hylorada_v2):
            received = f"{label}: structure {structure}"
            raise ConfigError("Only hylorada_v2 reads structure.", received, "Leave it out there.")
        return Variant(label=label, kind=kind, structure=structure, candidates=candidates)

    def _candidate(self, kind: str, settings: dict[str, Any], point: dict[str, Any]) -> Candidate:
        if kind != "adapter":
            return Candidate(point=point, config=None)
        searched = {name: value for name, value in point.items() if name in _ADAPTER}
        config = HyLoRADAConfig.from_dict({**self.adapter, **settings, **searched})
        if "lora_plus_ratio" in searched and not config.lora_plus_enabled:
            rule = "lora_plus_ratio is read with LoRA+ only."
            raise ConfigError(rule, f"a grid of it for {settings}", 'Add "lora_plus_enabled": true.')
        return Candidate(point=point, config=config)

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
        hints = get_type_hints(cls)
        for name, value in settings.items():
            try:
                msgspec.convert([value] if name == "steps" and isinstance(value, int) else value, hints[name])
            except msgspec.ValidationError as error:
                rule = "An experiment's settings have the types of their names."
                raise ConfigError(rule, f"{path}: {name}: {error}", "Correct it.") from None
        if changes.keys() & {"epochs", "steps"}:
            settings = {key: value for key, value in settings.items() if key not in ("epochs", "steps")}
        return cls(**(settings | changes))


def require_each_once(name: str, values: Collection[Any]) -> None:
    """Raises a ConfigError for a list that is empty or names something twice."""
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{name} must be there, each once.", list(values), "Correct the list.")


def best_part(ranked: Sequence[Any], keep: float) -> list[Any]:
    """The first of a ranking that go on to the next budget: ⌈keep · n⌉ of n.

    Example:
        >>> best_part("abcdefg", 1 / 3)
        ['a', 'b', 'c']
    """
    return list(ranked[: math.ceil(keep * len(ranked))])


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What of some settings is not as it was when they were written as JSON; empty where all is."""
    now = json.loads(json.dumps(ours))  # a tuple comes back as a list
    return "; ".join(f"{k} {theirs.get(k)!r}, now {now[k]!r}" for k in now if theirs.get(k) != now[k])


def dev_loss(record: Mapping[str, Any]) -> float:
    """The held-out loss of a run, in nats, from its record; infinite where it did not end."""
    return record["result"].get("dev_loss", math.inf)
