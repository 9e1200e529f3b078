"""The errors a user can meet: each states the rule, the value received and the remedy."""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Self

from hylorada_jax.terminal import brief
from hylorada_jax.text import shown


class HyLoRADAError(ValueError):
    """Base of every error this project raises on bad input.

    Args:
        rule: what must hold, as a sentence.
        received: what was found instead; shown as it prints.
        remedy: what to do about it, as a sentence.

    The message is fit for a terminal whatever was received: printable, of bearable length, and no name with
    newlines in it forges a line. The attributes keep what was given.

    Example:
        >>> print(HyLoRADAError("r must be ≥ 1.", 0, "Give 1."))
        r must be ≥ 1.
          received: 0
          remedy:   Give 1.
    """

    def __init__(self, rule: str, received: object, remedy: str) -> None:
        super().__init__(f"{brief(rule)}\n  received: {brief(received)}\n  remedy:   {brief(remedy)}")
        self.rule, self.received, self.remedy = rule, received, remedy

    def at(self, place: str) -> Self:
        """The same error, with the place in front of what was received."""
        return type(self)(self.rule, f"{place}: {self.received}", self.remedy)

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        # Exception's default would call the constructor with one argument and fail to unpickle.
        return type(self), (self.rule, self.received, self.remedy)


class ConfigError(HyLoRADAError):
    """A setting is out of range, unknown, or contradicts another."""


class TargetError(HyLoRADAError):
    """A target pattern matches no layer of the model, or layers it cannot adapt."""


class ModelError(HyLoRADAError):
    """A base model cannot be found, read, or computed correctly."""


class DataError(HyLoRADAError):
    """Training or evaluation data cannot be found or used."""


class CheckpointError(HyLoRADAError):
    """A checkpoint, adapter file or output directory is missing, damaged or in the way."""


class NonFiniteError(HyLoRADAError):
    """A loss, a logit or a parameter became NaN or infinite."""


def require_packages(rule: str, packages: Iterable[str], remedy: str) -> None:
    """Raises a ConfigError that names those of the packages which are not installed."""
    found = {name: importlib.util.find_spec(name) for name in packages}
    # Without an origin: a directory of that name, such as wandb/ beside the runs, and no package.
    if missing := [name for name, spec in found.items() if spec is None or spec.origin is None]:
        raise ConfigError(rule, f"no package {' and no '.join(missing)}", remedy)


def near(name: object, known: Iterable[str]) -> str:
    """The remedy for an unknown name: those that resemble it, or else all that are known."""
    # Cut, for difflib takes its time over a long text.
    matches = difflib.get_close_matches(name[:80] if isinstance(name, str) else shown(name), list(known), n=3)
    return f"Did you mean {' or '.join(matches)}?" if matches else f"Known: {', '.join(known)}."


def require_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raises a ConfigError for a setting that is none of those that are known."""
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}.", shown(value), near(value, known))
