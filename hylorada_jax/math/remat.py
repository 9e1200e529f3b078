"""What the backward pass computes again, and what it may keep."""

import functools

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Shaped

OUTPUT = "output"
"""The name, for ``jax.checkpoint``, of what attention gives, and a linear layer with its adapter, if any."""


def named_output(y: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """y by the name :data:`OUTPUT`, which each linear layer gives once, and attention.

    It stands after the last product that is as wide as y. What has a derivative of its own must read this
    array there: an earlier one would be computed again, with the product.

    Example:
        >>> named_output(jax.numpy.ones(1)).tolist()
        [1.0]
    """
    return checkpoint_name(y, OUTPUT)


# Whatever a layer's rematerialisation is, where that costs less than to write and read the result: of what is
# elementwise, of a norm in float32, of a kernel in codes. Across the loops over the layers no compiler takes
# the second time for the first.
computed_again = functools.partial(jax.checkpoint, prevent_cse=False)
