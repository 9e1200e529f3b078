"""The bounds of a seed. Imports neither jax nor numpy, so a command line starts fast."""

from hylorada_jax.errors import ConfigError


def check_seed(seed: object) -> None:
    """Raises unless the seed is an integer in [0, 2³²): of a larger one jax would drop bits.

    Args:
        seed: as the user gave it.

    Raises:
        ConfigError: it is no such integer.

    Example:
        >>> check_seed(2**32)
        Traceback (most recent call last):
        hylorada_jax.errors.ConfigError: seed must be an integer in [0, 2³²).
          received: 4294967296
          remedy:   Choose one, such as 0.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError("seed must be an integer in [0, 2³²).", repr(seed), "Choose one, such as 0.")
