"""The soft cap of logits, with its derivative for what has no other."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_capped(
    scores: Float[Array, "*shape"], cap: float | None
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"] | float]:
    """Logits that a bound holds, and their derivative.

        S = cap · tanh(s / cap),   dS/ds = 1 − (S / cap)²

    Args:
        scores: s.
        cap: the bound; None: none, where S = s.

    Returns:
        S and dS/ds, in the dtype of the scores; 1.0 where there is no cap.

    Source: Gemma Team, arXiv:2408.00118 §2.

    Example:
        >>> soft_capped(jnp.array([0.0, 1e9]), 30.0)[0].tolist()
        [0.0, 30.0]
    """
    if cap is None:
        return scores, 1.0
    ratio = jnp.tanh(scores / cap)
    return cap * ratio, 1 - ratio * ratio
