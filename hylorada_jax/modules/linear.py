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
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.config import check_lora_a
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.leaves import KINDS, Kind
from hylorada_jax.math import linear_adapter, low_rank
from hylorada_jax.math.position import check_positions
from hylorada_jax.modules.position import PositionBias

# p of every token, from the adapter's resolved leaves.
TokenScale = Callable[[Mapping[str, Array]], Array]


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
        token_scale: TokenScale | None = None,
        detach_norm: bool = False,
        **start: Any,
    ) -> Array:
        # Users bring numpy arrays too, as inputs and as parameters.
        x, base_output, base_weight = (jnp.asarray(given) for given in (x, base_output, base_weight))
        self._check(x, base_output, base_weight)
        start |= {"lora_A_init": self.lora_A_init, "lora_A_gain": self.lora_A_gain}
        norm_squared = low_rank.row_norm_squared(base_weight)

        def fresh(key: Array, name: str) -> Array:
            return linear_adapter.init_leaves(kind, key, self.rank, self.in_features, norm_squared, **start)[
                name
            ]

        leaves = {name: jnp.asarray(self.param(name, fresh, name)) for name in KINDS[kind]}
        scale = self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
        resolved = linear_adapter.resolve_leaves(
            leaves, base_weight, norm_squared, scale, detach_norm=detach_norm
        )
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        p = None if token_scale is None else token_scale(resolved)
        delta = low_rank.low_rank_delta(x, resolved["lora_A"], resolved["scaled_B"], p)
        return low_rank.adapted_output(base_output, delta, resolved.get("column_scale"))

    def _check(self, x: Array, base_output: Array, base_weight: Array) -> None:
        layer = type(self).__name__
        if min(self.in_features, self.out_features, self.rank) < 1:
            raise ConfigError(
                f"{layer}: in_features, out_features and rank must be ≥ 1.",
                f"{self.in_features}, {self.out_features}, {self.rank}",
                "Give the sizes of the frozen layer, and a rank of 1 or more.",
            )
        check_lora_a(self.lora_A_init, self.lora_A_gain)
        d_in, d_out = self.in_features, self.out_features
        expected = ((*x.shape[:-1], d_in), (*x.shape[:-1], d_out), (d_out, d_in))
        if (x.shape, base_output.shape, base_weight.shape) != expected:
            raise ConfigError(
                f"{layer}({d_in}, {d_out}): x is [..., {d_in}], base_output [..., {d_out}] and base_weight "
                f"[{d_out}, {d_in}].",
                f"x {x.shape}, base_output {base_output.shape}, base_weight {base_weight.shape}",
                "Give the sizes of the frozen layer, and kernel.T of an nn.Dense as base_weight.",
            )


class LoRALinear(_LinearAdapter):
    """Low-rank adaptation of a linear layer.

        y = base + s·(x Aᵀ) Bᵀ,  s = α/r, or α/√r with ``use_rslora``

    Attributes:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r ≥ 1.
        alpha: α.
        dropout: probability of dropping an input of the low-rank path.
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

        y = (base + δ)·m'/‖W + s·B A‖

    Attributes:
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

        Example:
            >>> import jax, jax.numpy as jnp
            >>> x, W = jnp.ones((2, 3)), jnp.ones((4, 3))
            >>> layer = DoRALinear(3, 4, rank=2)
            >>> params = layer.init(jax.random.key(0), x, x @ W.T, W)
            >>> _, params = layer.apply(params, 4 * W, method="init_magnitude", mutable="params")
            >>> bool(jnp.array_equal(layer.apply(params, x, x @ (4 * W).T, 4 * W), x @ (4 * W).T))
            True
        """
        norm = low_rank.safe_sqrt(low_rank.row_norm_squared(jnp.asarray(base_weight)))
        self.put_variable("params", "magnitude", norm)


class HyLoRADALinear(DoRALinear):
    """DoRA and LoRA blended by learned gates, from an orthogonal start (HyLoRADA v1).

        y = (base + δ)·((1−β)·m/‖W + s·B A‖ + β),  m = g·m' + (1−g)·‖W‖

    Attributes:
        gate_init: magnitude_gate at the start; g is its sigmoid.
        residual_init: residual_weight at the start; β is its sigmoid.
        detach_norm: stop the gradient at the norm.

    Parameters: lora_A [r, d_in] orthogonal, lora_B [d_out, r] zeros, magnitude [d_out] = ‖W‖, and the
    scalars magnitude_gate and residual_weight.

    Raises:
        ConfigError: it is given a structure prior, which only v2 reads.

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
        if structure_prior is not None:
            raise ConfigError(
                "HyLoRADALinear (v1) takes no structure prior.",
                getattr(structure_prior, "shape", structure_prior),
                "Use HyLoRADAv2Linear, which reads it by its scale_from_structure.",
            )
        return self._blend("hylorada_v1", x, base_output, base_weight, deterministic)

    def _blend(
        self,
        kind: Kind,
        x: Array,
        base_output: Array,
        base_weight: Array,
        deterministic: bool,
        token_scale: TokenScale | None = None,
        **start: Any,
    ) -> Array:
        return self._adapt(
            kind,
            x,
            base_output,
            base_weight,
            deterministic,
            token_scale=token_scale,
            detach_norm=self.detach_norm,
            gate_init=self.gate_init,
            residual_init=self.residual_init,
            **start,
        )


class HyLoRADAv2Linear(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down, token by token, by a structure prior (HyLoRADA v2).

        y = (base + δ·p)·c,  p = 0.5 + σ(structure_prior · scale_from_structure);  p = 1 without a prior

    Attributes:
        structure_dim: width of the prior.

    Parameters: HyLoRADALinear's, and scale_from_structure [structure_dim] zeros, so that p starts at 1.

    Raises:
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
        token_scale = None
        if structure_prior is not None:
            prior, expected = jnp.asarray(structure_prior), (*jnp.shape(x)[:-1], self.structure_dim)
            if prior.shape != expected:
                raise DataError(
                    "structure_prior is [*tokens, structure_dim], one row for every token of x.",
                    f"structure_prior {prior.shape}, expected {expected}",
                    "Give the encoder the positions of the same tokens, and hidden_size=structure_dim.",
                )
            token_scale = lambda resolved: low_rank.structure_scale(prior, resolved["scale_from_structure"])
        return self._blend(
            "hylorada_v2",
            x,
            base_output,
            base_weight,
            deterministic,
            token_scale,
            structure_dim=self.structure_dim,
        )


class HyLoRADAUnified(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down by the position of the token (HyLoRADA Unified).

        y = (base + δ·p)·c,  p = 1 + σ(position_scale)·tanh(position_bias[bucket(position)])

    Attributes:
        position_bias: the one :class:`~hylorada_jax.modules.position.PositionBias` that all layers of a model
            share; its parameter is counted once, where it is. None is p = 1, and not a bias of the layer's
            own: it serves a whole model, and a layer that forgot it must not train another.

    Parameters: HyLoRADALinear's, and the scalar position_scale 0.

    Raises:
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
        tokens = jnp.shape(x)[:-1]
        if positions is None:
            positions = jnp.indices((1, *tokens), jnp.int32)[-1, 0]
        positions = jnp.asarray(positions)
        check_positions(positions, tokens)
        token_scale = None
        if self.position_bias is not None:
            factor = self.position_bias(positions)
            token_scale = lambda resolved: low_rank.position_scale(factor, resolved["position_gate"])
        return self._blend("hylorada", x, base_output, base_weight, deterministic, token_scale)
