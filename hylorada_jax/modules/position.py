"""The position bias that all the Unified layers of a model share."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.math.position import NUM_BUCKETS, check_positions, position_factor


class PositionBias(nn.Module):
    """How much each position turns the low-rank updates up or down; one for all layers of a model.

        t = tanh(position_bias[bucket(position)])

    Parameters: position_bias [64] zeros; float32.

    Raises:
        DataError: the positions are no integers ≥ 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> PositionBias().init_with_output(jax.random.key(0), jnp.arange(3))[0].tolist()
        [0.0, 0.0, 0.0]

    Source: method.md §§1–2.
    """

    @nn.compact
    def __call__(self, positions: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """The factor t in (−1, 1) of every position."""
        positions = jnp.asarray(positions)
        check_positions(positions)
        position_bias = self.param("position_bias", nn.initializers.zeros, (NUM_BUCKETS,), jnp.float32)
        return position_factor(jnp.asarray(position_bias), positions)
