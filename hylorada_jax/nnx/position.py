"""The position bias that all the Unified layers of a model share, as an NNX module."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.math.position import NUM_BUCKETS, check_positions, position_factor
from hylorada_jax.modules.checks import check_buckets
from hylorada_jax.nnx.variables import AdapterParam


class PositionBias(nnx.Module):
    """A learned factor of the low-rank updates for each position; one for all layers of a model.

        t = tanh(position_bias[bucket(position)])

    Args, errors and source: :class:`hylorada_jax.PositionBias`. ``rngs`` is taken as by every NNX module, and
    not read: it starts at zero.

    Example:
        >>> PositionBias()(jnp.arange(3)).tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, num_buckets: int = NUM_BUCKETS, *, rngs: nnx.Rngs | None = None) -> None:
        check_buckets(num_buckets)
        self.position_bias = AdapterParam(jnp.zeros(num_buckets), component="position_bias")

    def __call__(self, positions: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """The factor t in (−1, 1) of every position."""
        positions = jnp.asarray(positions)
        check_positions(positions)
        return position_factor(self.position_bias[...], positions)
