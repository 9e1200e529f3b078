"""Positions that a model has no place for are refused before anything is computed."""

import jax
import numpy as np
from jaxtyping import Array, Int

from hylorada_jax.errors import DataError
from hylorada_jax.math.position import check_positions


def check_range(
    shape: tuple[int, ...], position_ids: Int[Array, "batch seq"] | None = None, limit: int | None = None
) -> None:
    """Refuse tokens or position ids that lie beyond a model's table of positions.

    Args:
        shape: (batch, seq) of the tokens.
        position_ids: position ids. Values are read where they are known, outside of a compiled program.
        limit: rows of the table; None for a model that computes its positions (rotary, relative).

    Raises:
        DataError: saying what is out of range.

    Example:
        >>> check_range((1, 2), np.array([[6, 7]]), limit=8)
    """
    beyond = f"{shape[-1]} tokens in a row" if limit is not None and shape[-1] > limit else ""
    if position_ids is not None:
        known = not isinstance(position_ids, jax.core.Tracer)
        # Not jnp.asarray, which takes an integer of 64 bits for another one of 32.
        positions = np.asarray(position_ids) if known else position_ids
        check_positions(positions, shape)
        if known and positions.size and limit is not None and (largest := positions.max()) >= limit:
            beyond = f"a position of {largest}"
    if beyond:
        raise DataError(
            f"Positions of this model lie below {limit}, the length of its table.",
            beyond,
            f"Cut the rows to {limit} tokens, or choose a model with a longer context.",
        )
