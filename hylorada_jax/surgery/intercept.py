"""Tokens second: the forward pass of adapted layers, attached without editing the model."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from hylorada_jax.math import low_rank
from hylorada_jax.surgery.linears import KERNEL_IS_OUT_IN

COLLECTION = "hylorada"
DROPOUT_RNG = "dropout"


def adapt_linears(*, dropout: float = 0.0, scales_bias: bool = False) -> Any:
    """A context in which every linear module with variables in the ``hylorada`` collection is adapted.

        y = (x Wᵀ + δ)·c + bias          (the bias inside the bracket with ``scales_bias``)

    Flax hands each module its own slice of the collection, also under nn.scan and nn.remat, so that no
    model needs to be edited. Modules without variables there run as they are.

    Args:
        dropout: probability of dropping an input of the low-rank path; needs an rng named "dropout".
        scales_bias: let c act on the bias too.

    Returns:
        A context manager, to be entered around ``module.apply``.

    Example:
        >>> import jax.numpy as jnp
        >>> dense, x = nn.Dense(4, use_bias=False), jnp.ones((1, 3))
        >>> params = dense.init(jax.random.key(0), x)["params"]
        >>> resolved = {"lora_A": jnp.ones((1, 3)), "lora_B": jnp.ones((4, 1))}
        >>> with adapt_linears():
        ...     y = dense.apply({"params": params, "hylorada": resolved}, x)
        >>> bool(jnp.allclose(y - dense.apply({"params": params}, x), 3.0, atol=1e-5))
        True
    """

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if (
            context.method_name != "__call__"
            or type(module).__name__ not in KERNEL_IS_OUT_IN
            or not module.has_variable(COLLECTION, "lora_A")
        ):
            return next_fun(*args, **kwargs)
        adapter = {
            name: module.get_variable(COLLECTION, name)
            for name in ("lora_A", "lora_B", "column_scale")
            if module.has_variable(COLLECTION, name)
        }
        return _adapted(module, *args, **kwargs, adapter=adapter, dropout=dropout, scales_bias=scales_bias)

    return nn.intercept_methods(interceptor)


def _adapted(
    module: Any, inputs: Array, *, adapter: dict[str, Array], dropout: float, scales_bias: bool
) -> Array:
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(
        inputs, module.get_variable("params", "kernel"), bias, dtype=module.dtype
    )
    contracted = 1 if KERNEL_IS_OUT_IN[type(module).__name__] else 0
    base = jax.lax.dot_general(
        x, kernel, (((x.ndim - 1,), (contracted,)), ((), ())), precision=module.precision
    )
    if bias is not None and scales_bias:
        base = base + bias
    if dropout:
        keep = jax.random.bernoulli(module.make_rng(DROPOUT_RNG), 1 - dropout, x.shape)
        x = jax.numpy.where(keep, x / (1 - dropout), 0)
    delta = low_rank.low_rank_delta(x, adapter["lora_A"], adapter["lora_B"])
    y = low_rank.adapted_output(base, delta, adapter.get("column_scale"))
    return y if bias is None or scales_bias else y + bias
