"""The command line's options that say how tokens are chosen."""

import dataclasses
import sys
from typing import Any

import tyro

from hylorada_jax.cli.flags import flag_of
from hylorada_jax.errors import ConfigError

ANSWER_TOKENS = 1024
"""New tokens of an answer in a chat, at most, where neither the user nor the model says it."""
PROMPT_TOKENS = 64
"""Those of a prompt that is continued."""


def new_tokens(most: int, before: int, context: int | None, least: int) -> int:
    """``most``, or as many as there is room for behind the longest prompt.

    Args:
        most: ANSWER_TOKENS or PROMPT_TOKENS.
        before: tokens in front of the new ones in their row: of the longest prompt, or of a decoder's start.
        context: tokens of a row; None for any number.
        least: new tokens where there is no room: PROMPT_TOKENS, if the model can go on beyond its context.

    Example:
        >>> new_tokens(1024, 100, None, 64), new_tokens(1024, 100, 1024, 64)
        (1024, 924)
        >>> new_tokens(1024, 1000, 1024, 64), new_tokens(1024, 1000, 1024, 1)
        (64, 24)
    """
    return most if context is None else min(most, max(least, context - before))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; in a chat the defaults are the model's own settings.

    Args:
        max_new_tokens: largest number of new tokens.
        temperature: 0 takes the most likely token; higher values sample.
        top_k: sample among the k most likely tokens; 0 is all.
        top_p: sample among the most likely tokens that together have this probability; 1 is all.
        min_p: sample among the tokens at least this many times as probable as the most likely.
        repetition_penalty: above 1, tokens that occurred before become less likely.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def settings(self, model: str | None, max_new_tokens: int) -> dict[str, Any]:
        """The settings of ``generate``; a line says which of them are the model's.

        Args:
            model: whose own settings are taken where the user gives none; None: those of no model.
            max_new_tokens: where neither says it.

        Raises:
            ConfigError: tokens are to be filtered, and the most likely one is taken.
        """
        from hylorada_jax.models.generation_config import FILTERS, OFF, generation_defaults

        given = {name: value for name, value in vars(self).items() if value is not None}
        own = {} if model is None else generation_defaults(model)
        chosen = {"max_new_tokens": max_new_tokens, "temperature": 0.0, **own, **given}
        if not chosen["temperature"] and (
            idle := [name for name in FILTERS if name in given and given[name] != OFF[name]]
        ):
            raise ConfigError(
                "Tokens are filtered where they are sampled, at a temperature above 0.",
                ", ".join(f"{flag_of(name)} {given[name]:g}" for name in idle) + " at temperature 0",
                "Give --temperature too; 1 samples by the model's own probabilities.",
            )
        heeded = {
            name: value
            for name, value in own.items()
            if name not in given and (chosen["temperature"] or name not in FILTERS)
        }
        if heeded:
            said = ", ".join(f"{name} {value:g}" for name, value in heeded.items())
            print(f"the model's own settings: {said}", file=sys.stderr)
        return chosen


# A group of the help, without a prefix: --temperature, not --sampling.temperature.
Sampling = tyro.conf.OmitArgPrefixes[SamplingOptions]
AS_IT_IS = SamplingOptions()
