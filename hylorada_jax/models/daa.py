"""Where attention finds its direct adaptation: beside the weights, in the adapters' collection."""

import flax.linen as nn

from hylorada_jax.math.attention import DAA
from hylorada_jax.trees import COLLECTION


def daa_of(module: nn.Module) -> DAA | None:
    """The direct attention adaptation of a bound attention module, None where it has none.

    Args:
        module: bound; its variables in the adapters' collection are read.
    """
    if not module.has_variable(COLLECTION, "alpha"):
        return None
    bias = module.get_variable(COLLECTION, "position_bias", None)
    return DAA(module.get_variable(COLLECTION, "alpha"), module.get_variable(COLLECTION, "beta"), bias)
