"""The linear adapters as Linen modules, for networks of your own.

Each is called with what the frozen layer got, gave, and holds::

    adapter(x, base_output, base_weight, deterministic=True)

and computes y = (base + δ)·c (method.md §1). ``base_weight`` is [d_out, d_in]: pass ``kernel.T`` of an
``nn.Dense``. Leave the frozen layer's bias out of ``base_output`` and add it afterwards, so that a trained
adapter can be merged or exported as a DoRA adapter. Dropout needs an rng named "dropout".

These modules compute c at every call. Attached to a whole model, :class:`hylorada_jax.HyLoRADAModel`
computes it once per optimizer step instead.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hylorada_jax.errors import ConfigError
from hylorada_jax.math import linear_adapter, low_rank


class LoRALinear(nn.Module):
    """Low-rank adaptation of a linear layer.

        y = base + s·(x Aᵀ) Bᵀ,  s = α/r, or α/√r with ``use_rslora``

    Attributes:
        rank: r ≥ 1.
        alpha: α.
        dropout: probability of dropping an input of the low-rank path.
        use_rslora: scale by α/√r.

    Parameters: lora_A [r, d_in] Kaiming-uniform(a=√5), lora_B [d_out, r] zeros; float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y, params = LoRALinear(rank=2).init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: Hu et al. 2021, §4.1; Kalajdzievski 2023 (rsLoRA).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False

    def _adapt(
        self,
        kind: str,
        x: Array,
        base_output: Array,
        base_weight: Array,
        deterministic: bool,
        *,
        detach_norm: bool = False,
        gate_init: float = 0.0,
        residual_init: float = 0.0,
    ) -> Array:
        # Users bring numpy arrays too, as inputs and as parameters.
        x, base_output, base_weight = (jnp.asarray(given) for given in (x, base_output, base_weight))
        _check_shapes(type(self).__name__, self.rank, x, base_output, base_weight)
        norm_squared = low_rank.row_norm_squared(base_weight)

        def fresh(key: Array, name: str) -> Array:
            return linear_adapter.init_leaves(
                kind,
                key,
                self.rank,
                base_weight.shape[1],
                norm_squared,
                gate_init=gate_init,
                residual_init=residual_init,
            )[name]

        leaves = {name: jnp.asarray(self.param(name, fresh, name)) for name in linear_adapter.LEAVES[kind]}
        scale = self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
        resolved = linear_adapter.resolve_leaves(
            leaves, base_weight, norm_squared, scale, detach_norm=detach_norm
        )
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        delta = low_rank.low_rank_delta(x, resolved["lora_A"], resolved["lora_B"])
        return low_rank.adapted_output(base_output, delta, resolved.get("column_scale"))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        deterministic: bool = True,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        return self._adapt("lora", x, base_output, base_weight, deterministic)


class DoRALinear(LoRALinear):
    """Weight-decomposed low-rank adaptation: a learned magnitude on the row-normalised adapted weight.

        y = (base + δ)·m'/‖W + s·B A‖

    Attributes:
        detach_norm: stop the gradient at the norm.

    Parameters: LoRALinear's, and magnitude [d_out] starting at ‖W‖.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y, params = DoRALinear(rank=2).init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: Liu et al. 2024 (DoRA), eq. 5 and §4.3.
    """

    detach_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        deterministic: bool = True,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        return self._adapt("dora", x, base_output, base_weight, deterministic, detach_norm=self.detach_norm)


class HyLoRADALinear(LoRALinear):
    """DoRA and LoRA blended by learned gates, from an orthogonal start (HyLoRADA v1).

        y = (base + δ)·((1−β)·m/‖W + s·B A‖ + β),  m = g·m' + (1−g)·‖W‖

    Attributes:
        gate_init: magnitude_gate at the start; g is its sigmoid.
        residual_init: residual_weight at the start; β is its sigmoid.
        detach_norm: stop the gradient at the norm.

    Parameters: lora_A [r, d_in] orthogonal, lora_B [d_out, r] zeros, magnitude [d_out] = ‖W‖, and the
    scalars magnitude_gate and residual_weight.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y, params = HyLoRADALinear(rank=2).init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: method.md §1.
    """

    gate_init: float = 0.0
    residual_init: float = 0.1
    detach_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        deterministic: bool = True,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        return self._adapt(
            "hylorada_v1",
            x,
            base_output,
            base_weight,
            deterministic,
            detach_norm=self.detach_norm,
            gate_init=self.gate_init,
            residual_init=self.residual_init,
        )


def _check_shapes(layer: str, rank: int, x: Array, base_output: Array, base_weight: Array) -> None:
    if rank < 1:
        raise ConfigError(f"{layer}: rank must be ≥ 1", rank, "Give a rank of 1 or more.")
    expected = (*x.shape[:-1], base_weight.shape[0]) if base_weight.ndim == 2 else ()
    if base_weight.ndim != 2 or x.shape[-1] != base_weight.shape[1] or base_output.shape != expected:
        raise ConfigError(
            f"{layer}: x [..., d_in], base_output [..., d_out] and base_weight [d_out, d_in] must agree",
            f"x {x.shape}, base_output {base_output.shape}, base_weight {base_weight.shape}",
            "Pass kernel.T of an nn.Dense as base_weight.",
        )
