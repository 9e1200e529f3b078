"""The position bias that all the Unified layers of a model share."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.math.position import NUM_BUCKETS, check_positions, position_factor
from hylorada_jax.modules.checks import check_buckets


class PositionBias(nn.Module):
    """A learned factor of the low-rank updates for each position; one for all layers of a model.

        t = tanh(position_bias[bucket(position)])

    Attributes:
        num_buckets: N, 2 … 32768.

    Parameters: position_bias [num_buckets] zeros; float32.

    Raises:
        ConfigError: num_buckets is out of range.
        DataError: the positions are not integers ≥ 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> PositionBias().init_with_output(jax.random.key(0), jnp.arange(3))[0].tolist()
        [0.0, 0.0, 0.0]

    Source: method.md §§1–2.
    """

    num_buckets: int = NUM_BUCKETS

    @nn.compact
    def __call__(self, positions: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """The factor t in (−1, 1) of every position."""
        check_buckets(self.num_buckets)
        positions = jnp.asarray(positions)
        check_positions(positions)
        shape = (self.num_buckets,)
        position_bias = self.param("position_bias", nn.initializers.zeros, shape, jnp.float32)
        return position_factor(jnp.asarray(position_bias), positions)
