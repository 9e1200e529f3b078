"""Mixtures whose experts are one tensor for each of their layers: gpt-oss's and Gemma 4's.

No adapter attaches to these layers, nor to gpt-oss's router: in transformers and PEFT too they are no linear
modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hylorada_jax.math import experts
from hylorada_jax.math.remat import computed_again, named_output
from hylorada_jax.models.dense import Dense, promote_dtype, scaled
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.mixture import EXPERTS, by_experts

# HF's names of the tensors of all experts; a bias [experts, out] has "_bias" behind.
GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Router(nn.Module):
    """The linear layer that weighs the experts, x · kernel + bias."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query experts"]:
        """Applies the layer."""
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.normal(), (self.features,), jnp.float32)
        x, kernel, bias = promote_dtype(x, kernel, bias)
        return named_output(x @ kernel) + bias


class ScaledRouter(nn.Module):
    """Gemma 4's: the linear layer that weighs the experts, of (x ⊙ scale) / √hidden."""

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch query hidden"]
    ) -> tuple[Float[Array, "batch query experts"], Float[Array, " experts"]]:
        """The experts' logits, of x after a norm without a weight, and the factor of each one's weight."""
        ones = nn.initializers.ones
        # HF's "scale": a leaf of that name is a norm's weight here.
        scale = self.param("input_scale", ones, (x.shape[-1],), jnp.float32)
        factor = self.param("per_expert_scale", ones, (self.features,), jnp.float32)
        x = scaled(x * scale, x.shape[-1] ** -0.5)
        return Dense(self.features, use_bias=False, name="proj")(x), factor


class FusedExperts(nn.Module):
    """The experts, down(glu(gate_up(x))).

    Args:
        mixture: sizes.
        glu: what gate_up gives, [..., 2·width] → [..., width]; it says how gate and up lie there.
        biases: both layers have one.
    """

    mixture: Mixture
    glu: Callable[[Array], Array]
    biases: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "groups rows hidden"], rows: experts.Rows
    ) -> Float[Array, "groups rows hidden"]:
        """Applies the experts to rows sorted by expert."""
        m = self.mixture

        def layer(name: str, x: Array, features: int) -> Array:
            shape, normal = (m.experts, x.shape[-1], features), nn.initializers.normal()
            kernel, bias = self.param(name, normal, shape, jnp.float32), None
            if self.biases:
                bias = self.param(f"{name}_bias", normal, (m.experts, features), jnp.float32)
            x, kernel, bias = promote_dtype(x, kernel, bias)
            y = named_output(experts.experts_dot(x, kernel, rows))
            return y if bias is None else y + bias[rows.expert]

        return layer(DOWN, self.glu(layer(GATE_UP, x, 2 * m.width)), x.shape[-1])


def bounded_glu(gate_up: Float[Array, "*rows twice"], limit: float) -> Float[Array, "*rows width"]:
    """gpt-oss's, of outputs in which gate and up alternate.

        glu(g, u) = (clip(u, −l, l) + 1) · g' · σ(1.702·g'),   g' = min(g, l)

    Source: transformers' GptOssExperts; OpenAI, arXiv:2508.10925 §2.2.
    """
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = jnp.minimum(gate, limit)
    return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(1.702 * gate)


class FusedMixtureBlock(nn.Module):
    """Σ w_e · expert_e(x) over the experts that the router gives a token; none is dropped.

    Args:
        mixture: sizes, and the router's name.
        limit: l of :func:`bounded_glu`.
    """

    mixture: Mixture
    limit: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query hidden"]:
        """Applies the block."""
        m = self.mixture
        glu = computed_again(partial(bounded_glu, limit=self.limit))
        return by_experts(
            m, x, Router(m.experts, name=m.router)(x), FusedExperts(m, glu, biases=True, name=EXPERTS)
        )
