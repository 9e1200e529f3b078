"""The linear adapters as NNX modules, for models of your own.

Names, arguments and errors are those of the Linen modules in :mod:`hylorada_jax.modules.linear`, where the
formulas are explained; ``rngs`` gives the keys of lora_A and, where there is any, of dropout, and without
such a stream there is a ConfigError. Each is called with what the frozen layer got, gave, and holds;
``base_weight`` is [d_out, d_in], ``kernel.T`` of an ``nnx.Linear``::

    adapter = HyLoRADALinear(in_features, out_features, rank=8, alpha=16.0, rngs=rngs)
    adapter(x, base_output, base_weight)

Dropout is on or off by ``model.train()`` and ``model.eval()``, or by ``deterministic``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.config import update_scale
from hylorada_jax.leaves import KINDS, Kind
from hylorada_jax.math import linear_adapter, low_rank
from hylorada_jax.modules.checks import (
    check_deterministic,
    check_linear,
    check_linear_call,
    check_prior,
    check_weight,
    refuse_prior,
    token_positions,
)
from hylorada_jax.nnx.position import PositionBias
from hylorada_jax.nnx.streams import checked_dropout
from hylorada_jax.nnx.variables import AdapterParam


class LoRALinear(nnx.Module):
    """Low-rank adaptation of a linear layer.

        y = base + s·(x Aᵀ) Bᵀ,  s = α/r, or α/√r with ``use_rslora``

    Args, errors and source: :class:`hylorada_jax.LoRALinear`.

    Example:
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y = LoRALinear(3, 4, rank=2, rngs=nnx.Rngs(0))(x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True
    """

    kind: Kind = "lora"
    detach_norm = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        lora_A_init: str | None = None,
        lora_A_gain: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.lora_A_init, self.lora_A_gain = lora_A_init, lora_A_gain
        check_linear(self)
        self.dropout = checked_dropout(dropout, rngs)
        leaves = linear_adapter.init_leaves(
            self.kind,
            rngs.params(),
            rank,
            in_features,
            jnp.full(out_features, jnp.nan),  # the magnitude's, until it meets a weight
            lora_A_init=lora_A_init,
            lora_A_gain=lora_A_gain,
        )
        for name, leaf in leaves.items():
            setattr(self, name, AdapterParam(leaf, component="linear"))

    def __call__(
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        deterministic: bool | None = None,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        return self._adapted(x, base_output, base_weight, deterministic)

    def _adapted(
        self,
        x: Array,
        base_output: Array,
        base_weight: Array,
        deterministic: bool | None,
        factor: Array | None = None,
    ) -> Array:
        x, base_output, base_weight = (jnp.asarray(given) for given in (x, base_output, base_weight))
        check_deterministic(deterministic)
        check_linear_call(self, x, base_output, base_weight)
        return linear_adapter.adapted_layer(
            self._leaves(base_weight),
            self.dropout(x, deterministic=deterministic),
            base_output,
            base_weight,
            update_scale(self.rank, self.alpha, self.use_rslora),
            detach_norm=self.detach_norm,
            factor=factor,
        )

    def _leaves(self, base_weight: Array) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in KINDS[self.kind]}


class DoRALinear(LoRALinear):
    """Weight-decomposed low-rank adaptation: a learned magnitude on the row-normalised adapted weight.

        y = (base + δ)·m'/‖W + s·B A‖,  δ = s·(x Aᵀ) Bᵀ

    The magnitude starts at ‖W‖ of the weight that the layer first meets, in :meth:`init_magnitude` or in a
    call; until then it is NaN. Set it before a loop, or a compiled step compiles twice, and one that merges
    the layer anew (``nnx.split``, ``jax.jit``) never trains it.

    Args, errors and source: :class:`hylorada_jax.DoRALinear`.

    Example:
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y = DoRALinear(3, 4, rank=2, rngs=nnx.Rngs(0))(x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True
    """

    kind: Kind = "dora"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        detach_norm: bool = True,
        rngs: nnx.Rngs,
        **lora: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, rngs=rngs, **lora)
        self.detach_norm = detach_norm
        self.has_met_a_weight = False

    def init_magnitude(self, base_weight: Float[Array, "d_out d_in"]) -> None:
        """Set the magnitude to ‖W‖.

        Args:
            base_weight: W.

        Raises:
            ConfigError: W has another shape.

        Example:
            >>> layer = DoRALinear(3, 2, rngs=nnx.Rngs(0))
            >>> layer.init_magnitude(jnp.array([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]]))
            >>> layer.magnitude[...].tolist()
            [5.0, 1.0]
        """
        base_weight = jnp.asarray(base_weight)
        check_weight(self, base_weight)
        self.magnitude[...] = low_rank.safe_sqrt(low_rank.row_norm_squared(base_weight))
        self.has_met_a_weight = True

    def _leaves(self, base_weight: Array) -> dict[str, Array]:
        if not self.has_met_a_weight:
            given = self.magnitude[...]
            self.init_magnitude(base_weight)
            self.magnitude[...] = _started(given, self.magnitude[...])
        return super()._leaves(base_weight)


@jax.custom_jvp
def _started(given: Array, start: Array) -> Array:
    """The start, unless a state was loaded into the layer; the gradient is that of the leaf given."""
    return jnp.where(jnp.isnan(given).all(), start.astype(given.dtype), given)


@_started.defjvp
def _(values: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _started(*values), tangents[0]


class HyLoRADALinear(DoRALinear):
    """DoRA and LoRA blended by learned gates, from an orthogonal start (HyLoRADA v1).

        y = (base + δ)·c,  c = (1−β)·m/‖W + s·B A‖ + β,  m = g·m' + (1−g)·‖W‖,  δ = s·(x Aᵀ) Bᵀ

    Args, errors and source: :class:`hylorada_jax.HyLoRADALinear`.

    Example:
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y = HyLoRADALinear(3, 4, rank=2, rngs=nnx.Rngs(0))(x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True
    """

    kind: Kind = "hylorada_v1"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        gate_init: float = 0.0,
        residual_init: float = 0.1,
        detach_norm: bool = False,
        rngs: nnx.Rngs,
        **lora: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, rank, alpha, dropout, detach_norm=detach_norm, rngs=rngs, **lora
        )
        self.magnitude_gate[...], self.residual_weight[...] = gate_init, residual_init

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        structure_prior: None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        refuse_prior(structure_prior)
        return self._adapted(x, base_output, base_weight, deterministic)


class HyLoRADAv2Linear(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down, token by token, by a structure prior (HyLoRADA v2).

        y = (base + δ·p)·c,  p = 0.5 + σ(structure_prior · scale_from_structure);  p = 1 without a prior

    δ and c are those of :class:`HyLoRADALinear`.

    Args, errors and source: :class:`hylorada_jax.HyLoRADAv2Linear`.

    Example:
        >>> x, W, prior = jnp.ones((1, 2, 3)), jnp.ones((4, 3)), jnp.ones((1, 2, 32))
        >>> layer = HyLoRADAv2Linear(3, 4, rank=2, structure_dim=32, rngs=nnx.Rngs(0))
        >>> bool(jnp.array_equal(layer(x, x @ W.T, W, prior), x @ W.T))
        True
    """

    kind: Kind = "hylorada_v2"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        structure_dim: int = 32,
        *,
        rngs: nnx.Rngs,
        **v1: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, rngs=rngs, **v1)
        self.structure_dim = structure_dim
        self.scale_from_structure = AdapterParam(jnp.zeros(structure_dim), component="linear")

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        structure_prior: Float[Array, "*tokens structure_dim"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        if structure_prior is not None:
            structure_prior = jnp.asarray(structure_prior)
            check_prior(structure_prior, x, self.structure_dim)
        return self._adapted(x, base_output, base_weight, deterministic, structure_prior)


class HyLoRADAUnified(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down by the position of the token (HyLoRADA Unified).

        y = (base + δ·p)·c,  p = 1 + σ(position_scale)·tanh(position_bias[bucket(position)])

    δ and c are those of :class:`HyLoRADALinear`.

    Args, errors and source: :class:`hylorada_jax.HyLoRADAUnified`; ``position_bias`` is the one NNX
    :class:`~hylorada_jax.nnx.PositionBias` that all layers of a model share.

    Example:
        >>> x, W, rngs = jnp.ones((1, 2, 3)), jnp.ones((4, 3)), nnx.Rngs(0)
        >>> layer = HyLoRADAUnified(3, 4, rank=2, position_bias=PositionBias(rngs=rngs), rngs=rngs)
        >>> bool(jnp.array_equal(layer(x, x @ W.T, W), x @ W.T))
        True
    """

    kind: Kind = "hylorada"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        position_bias: PositionBias | None = None,
        *,
        rngs: nnx.Rngs,
        **v1: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, rngs=rngs, **v1)
        self.position_bias = nnx.data(position_bias)

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "*batch seq d_in"],
        base_output: Float[Array, "*batch seq d_out"],
        base_weight: Float[Array, "d_out d_in"],
        positions: Int[Array, "*batch seq"] | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*batch seq d_out"]:
        """The adapted layer's output, in base_output's dtype; without positions they are 0, 1, 2 …"""
        positions = token_positions(positions, x.shape[:-1])
        factor = None if self.position_bias is None else self.position_bias(positions)
        return self._adapted(x, base_output, base_weight, deterministic, factor)
