"""The linear adapters as Linen modules, for networks of your own.

Each is called with what the frozen layer got, gave, and holds::

    adapter = HyLoRADALinear(in_features, out_features, rank=8, alpha=16.0)
    adapter(x, base_output, base_weight, deterministic=True)

and computes y = (base + δ)·c (method.md §1); the HyLoRADA layers take what they depend on before
``deterministic``. ``base_weight`` is [d_out, d_in]: pass ``kernel.T`` of an ``nn.Dense``. The sizes are
stated, as in the method's documents, and checked against the arrays. Leave the frozen layer's bias out of
``base_output`` and add it afterwards, so that a trained adapter can be merged or exported as a DoRA adapter.
Dropout needs an rng named "dropout".

These modules compute c at every call. Attached to a whole model, :class:`hylorada_jax.HyLoRADAModel`
computes it once per optimizer step instead.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.config import check_dropout, update_scale
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
from hylorada_jax.modules.position import PositionBias


class _LinearAdapter(nn.Module):
    """What all the linear adapters share."""

    in_features: int
    out_features: int
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = dataclasses.field(default=False, kw_only=True)
    lora_A_init: str | None = dataclasses.field(default=None, kw_only=True)  # noqa: N815
    lora_A_gain: float = dataclasses.field(default=1.0, kw_only=True)  # noqa: N815

    def _adapt(
        self,
        kind: Kind,
        x: Array,
        base_output: Array,
        base_weight: Array,
        deterministic: bool,
        *,
        factor: Array | None = None,
        detach_norm: bool = False,
        **start: Any,
    ) -> Array:
        # Users bring numpy arrays too, as inputs and as parameters.
        x, base_output, base_weight = (jnp.asarray(given) for given in (x, base_output, base_weight))
        check_linear(self)
        check_dropout(self.dropout)
        check_deterministic(deterministic)
        check_linear_call(self, x, base_output, base_weight)
        start |= {"lora_A_init": self.lora_A_init, "lora_A_gain": self.lora_A_gain}
        norm_squared = low_rank.row_norm_squared(base_weight)

        def fresh(key: Array, name: str) -> Array:
            return linear_adapter.init_leaves(kind, key, self.rank, self.in_features, norm_squared, **start)[
                name
            ]

        leaves = {name: jnp.asarray(self.param(name, fresh, name)) for name in KINDS[kind]}
        return linear_adapter.adapted_layer(
            leaves,
            nn.Dropout(self.dropout)(x, deterministic=deterministic),
            base_output,
            base_weight,
            update_scale(self.rank, self.alpha, self.use_rslora),
            detach_norm=detach_norm,
            factor=factor,
        )


class LoRALinear(_LinearAdapter):
    """Low-rank adaptation of a linear layer.

        y = base + s·(x Aᵀ) Bᵀ,  s = α/r, or α/√r with ``use_rslora``

    Attributes:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r ≥ 1.
        alpha: α.
        dropout: probability in [0, 1) of dropping an input of the low-rank path; ``deterministic=True``, the
            call's default, drops none.
        use_rslora: scale by α/√r.
        lora_A_init: "orthogonal", "kaiming", or None: as below.
        lora_A_gain: multiplies the initial lora_A, finite and > 0.

    Parameters: lora_A [r, d_in] Kaiming-uniform(a=√5), lora_B [d_out, r] zeros; float32.

    Raises:
        ConfigError: a setting is out of range, or x, base_output and base_weight are not of these sizes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y, params = LoRALinear(3, 4, rank=2).init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: Hu et al. 2021, §4.1; Kalajdzievski 2023 (rsLoRA).
    """

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


class DoRALinear(_LinearAdapter):
    """Weight-decomposed low-rank adaptation: a learned magnitude on the row-normalised adapted weight.

        y = (base + δ)·m'/‖W + s·B A‖,  δ = s·(x Aᵀ) Bᵀ

    Attributes: LoRALinear's, and
        detach_norm: stop the gradient at the norm.

    Parameters: LoRALinear's, and magnitude [d_out], ‖W‖ of the weight that ``init`` is called with.

    Raises:
        ConfigError: as LoRALinear.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y, params = DoRALinear(3, 4, rank=2).init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: Liu et al. 2024 (DoRA), eq. 5 and §4.3.
    """

    detach_norm: bool = dataclasses.field(default=True, kw_only=True)

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

    def init_magnitude(self, base_weight: Float[Array, "d_out d_in"]) -> None:
        """Set the magnitude to ‖W‖ of another weight than the one that ``init`` was called with.

        Args:
            base_weight: W.

        Raises:
            ConfigError: W has another shape.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
            >>> layer = DoRALinear(3, 4, rank=2)
            >>> params = layer.init(jax.random.key(0), x, x @ W.T, W)
            >>> _, params = layer.apply(params, 4 * W, method="init_magnitude", mutable="params")
            >>> bool(jnp.array_equal(layer.apply(params, x, x @ (4 * W).T, 4 * W), x @ (4 * W).T))
            True
        """
        base_weight = jnp.asarray(base_weight)
        check_weight(self, base_weight)
        norm = low_rank.safe_sqrt(low_rank.row_norm_squared(base_weight))
        self.put_variable("params", "magnitude", norm)


class HyLoRADALinear(DoRALinear):
    """DoRA and LoRA blended by learned gates, from an orthogonal start (HyLoRADA v1).

        y = (base + δ)·c,  c = (1−β)·m/‖W + s·B A‖ + β,  m = g·m' + (1−g)·‖W‖,  δ = s·(x Aᵀ) Bᵀ

    Attributes: LoRALinear's, and
        gate_init: magnitude_gate at the start; g is its sigmoid.
        residual_init: residual_weight at the start; β is its sigmoid.
        detach_norm: stop the gradient at the norm.

    Parameters: lora_A [r, d_in] orthogonal, lora_B [d_out, r] zeros, magnitude [d_out] = ‖W‖, and the
    scalars magnitude_gate and residual_weight.

    Raises:
        ConfigError: as LoRALinear, or it is given a structure prior, which only v2 reads.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
        >>> y, params = HyLoRADALinear(3, 4, rank=2).init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: method.md §1.
    """

    gate_init: float = dataclasses.field(default=0.0, kw_only=True)
    residual_init: float = dataclasses.field(default=0.1, kw_only=True)
    detach_norm: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        structure_prior: None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        refuse_prior(structure_prior)
        return self._blend("hylorada_v1", x, base_output, base_weight, deterministic)

    def _blend(
        self,
        kind: Kind,
        x: Array,
        base_output: Array,
        base_weight: Array,
        deterministic: bool,
        factor: Array | None = None,
        **start: Any,
    ) -> Array:
        return self._adapt(
            kind,
            x,
            base_output,
            base_weight,
            deterministic,
            factor=factor,
            detach_norm=self.detach_norm,
            gate_init=self.gate_init,
            residual_init=self.residual_init,
            **start,
        )


class HyLoRADAv2Linear(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down, token by token, by a structure prior (HyLoRADA v2).

        y = (base + δ·p)·c,  p = 0.5 + σ(structure_prior · scale_from_structure);  p = 1 without a prior

    δ and c are those of :class:`HyLoRADALinear`.

    Attributes: HyLoRADALinear's, and
        structure_dim: width of the prior.

    Parameters: HyLoRADALinear's, and scale_from_structure [structure_dim] zeros, so that p starts at 1.

    Raises:
        ConfigError: as LoRALinear.
        DataError: the prior is not [*tokens, structure_dim].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W, prior = jnp.ones((1, 2, 3)), jnp.ones((4, 3)), jnp.ones((1, 2, 32))
        >>> layer = HyLoRADAv2Linear(3, 4, rank=2, structure_dim=32)
        >>> y, params = layer.init_with_output(jax.random.key(0), x, x @ W.T, W, prior)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: method.md §§1, 5.
    """

    structure_dim: int = 32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*tokens d_in"],
        base_output: Float[Array, "*tokens d_out"],
        base_weight: Float[Array, "d_out d_in"],
        structure_prior: Float[Array, "*tokens structure_dim"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*tokens d_out"]:
        """The adapted layer's output, in base_output's dtype."""
        if structure_prior is not None:
            structure_prior = jnp.asarray(structure_prior)
            check_prior(structure_prior, x, self.structure_dim)
        return self._blend(
            "hylorada_v2",
            x,
            base_output,
            base_weight,
            deterministic,
            structure_prior,
            structure_dim=self.structure_dim,
        )


class HyLoRADAUnified(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down by the position of the token (HyLoRADA Unified).

        y = (base + δ·p)·c,  p = 1 + σ(position_scale)·tanh(position_bias[bucket(position)])

    δ and c are those of :class:`HyLoRADALinear`.

    Attributes: HyLoRADALinear's, and
        position_bias: the one :class:`~hylorada_jax.modules.position.PositionBias` that all layers of a model
            share; its parameter is counted once, where it is. None means p = 1: no layer makes a bias of its
            own, since one serves the whole model.

    Parameters: HyLoRADALinear's, and the scalar position_scale 0.

    Raises:
        ConfigError: as LoRALinear.
        DataError: the positions are not integers ≥ 0, or not one for every token of x.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, W = jnp.ones((1, 2, 3)), jnp.ones((4, 3))
        >>> layer = HyLoRADAUnified(3, 4, rank=2, position_bias=PositionBias())
        >>> y, params = layer.init_with_output(jax.random.key(0), x, x @ W.T, W)
        >>> bool(jnp.array_equal(y, x @ W.T))
        True

    Source: method.md §§1–2.
    """

    position_bias: PositionBias | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch seq d_in"],
        base_output: Float[Array, "*batch seq d_out"],
        base_weight: Float[Array, "d_out d_in"],
        positions: Int[Array, "*batch seq"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch seq d_out"]:
        """The adapted layer's output, in base_output's dtype; without positions they are 0, 1, 2 …"""
        positions = token_positions(positions, jnp.shape(x)[:-1])
        factor = None if self.position_bias is None else self.position_bias(positions)
        return self._blend("hylorada", x, base_output, base_weight, deterministic, factor)
