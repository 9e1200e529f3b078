"""transformers' Flax T5, which calls ``jnp.clip(a_max=…)``, a spelling that jax no longer has, repaired.

The call is in a static method; the ordinary method above it, ``compute_bias``, can be intercepted.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from transformers.models.t5.modeling_flax_t5 import FlaxT5Attention

from hylorada_jax.math.position import distance_buckets


def relative_buckets(
    queries: int, keys: int, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "query key"]:
    """T5's bucket of every offset of a key from a query; not those of the position bias in method.md §2.

        a  if a < X,  else  min(X + ⌊ln(a/X)/ln(max_distance/X)·(N−X)⌋, N−1);  plus N where k − q > 0
        a = |k − q|, N = num_buckets/2  (bidirectional);  a = max(q − k, 0), N = num_buckets  (else);  X = N/2

    Args:
        queries: positions 0 … queries−1.
        keys: positions 0 … keys−1.
        bidirectional: whether keys after the query have buckets of their own.
        num_buckets: of the whole table.
        max_distance: from here on all distances share the last bucket of their side.

    Returns:
        Buckets in [0, num_buckets).

    Example:
        >>> relative_buckets(1, 4, bidirectional=True, num_buckets=32, max_distance=128)[0].tolist()
        [0, 17, 18, 19]

    Source: Raffel et al. 2020, §2.1; transformers' ``modeling_t5.py``, whose buckets these are.
    """
    offset = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    side = num_buckets // 2 if bidirectional else num_buckets
    before = offset if bidirectional else np.minimum(offset, 0)
    own = distance_buckets(before, side, max_distance=max_distance)
    return (own + side * (offset > 0) * bidirectional).astype(np.int32)


class RepairedT5:
    """A stand-in for a T5 module, whose ``init`` and ``apply`` work.

    Args:
        module: a Linen module of transformers' T5.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        if name == "module" or name.startswith("__"):  # asked of an instance that is still being copied
            raise AttributeError(name)
        return getattr(self.module, name)

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``init``, repaired."""
        with repair_t5():
            return self.module.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own ``apply``, repaired."""
        with repair_t5():
            return self.module.apply(*args, **kwargs)


def repair_t5() -> Any:
    """A context in which T5's relative position bias is computed with our buckets."""
    return nn.intercept_methods(_compute_bias)


def _compute_bias(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if not isinstance(module, FlaxT5Attention) or context.method_name != "compute_bias":
        return next_fun(*args, **kwargs)
    buckets = relative_buckets(
        *args,
        **kwargs,
        bidirectional=not module.causal,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    return jnp.moveaxis(module.relative_attention_bias(jnp.asarray(buckets)), -1, 0)[None]
