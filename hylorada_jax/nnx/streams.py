"""The random streams that layers and adapters draw from."""

from typing import Any

from flax import nnx

from hylorada_jax.config import check_dropout
from hylorada_jax.errors import ConfigError


def check_streams(rngs: Any, *streams: str) -> None:
    """Refuses what are no rngs, or rngs without these streams.

    Raises:
        ConfigError: saying which of these.

    Example:
        >>> check_streams(nnx.Rngs(params=0), "params")
    """
    if not isinstance(rngs, nnx.Rngs):
        raise ConfigError("rngs are flax.nnx.Rngs.", type(rngs).__name__, "Give nnx.Rngs(0), or your own.")
    if missing := [name for name in streams if name not in rngs and "default" not in rngs]:
        raise ConfigError(
            "rngs have a stream for each use, or a default one: params for lora_A, dropout for its masks.",
            f"rngs without {' and '.join(missing)}",
            "Give nnx.Rngs(0), or nnx.Rngs(params=0, dropout=1).",
        )


def checked_dropout(rate: float, rngs: Any) -> nnx.Dropout:
    """The dropout of a layer whose start is drawn from the stream params; masks are drawn only at a rate.

    Raises:
        ConfigError: the rate is out of range, or the rngs lack a stream.

    Example:
        >>> checked_dropout(0.0, nnx.Rngs(params=0)).rate
        0.0
    """
    check_dropout(rate)
    check_streams(rngs, "params", *(["dropout"] if rate else []))
    return nnx.Dropout(rate, rngs=rngs if rate else None)
