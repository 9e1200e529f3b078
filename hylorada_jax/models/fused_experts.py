"""A mixture whose experts are one tensor for each of their layers, with biases everywhere: gpt-oss's.

No adapter attaches to its layers, nor to its router: in transformers and PEFT too they are no linear modules.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hylorada_jax.math import experts
from hylorada_jax.models.dense import promote_dtype
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.mixture import EXPERTS, by_experts

# HF's names of the tensors [experts, in, out]; a bias [experts, out] has "_bias" behind.
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
        return x @ kernel + bias


class FusedExperts(nn.Module):
    """The experts, down(glu(gate_up(x))); in gate_up's outputs gate and up alternate.

        glu(g, u) = (clip(u, −l, l) + 1) · g' · σ(1.702·g'),   g' = min(g, l)

    Source: transformers' GptOssExperts; OpenAI, arXiv:2508.10925 §2.2.
    """

    mixture: Mixture
    limit: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "groups rows hidden"], rows: experts.Rows
    ) -> Float[Array, "groups rows hidden"]:
        """Applies the experts to rows sorted by expert."""
        m = self.mixture

        def layer(name: str, x: Array, features: int) -> Array:
            shape, normal = (m.experts, x.shape[-1], features), nn.initializers.normal()
            kernel = self.param(name, normal, shape, jnp.float32)
            bias = self.param(f"{name}_bias", normal, (m.experts, features), jnp.float32)
            x, kernel, bias = promote_dtype(x, kernel, bias)
            return experts.experts_dot(x, kernel, rows) + bias[rows.expert]

        def glu(gate_up: Array) -> Array:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
            gate = jnp.minimum(gate, self.limit)
            return (jnp.clip(up, -self.limit, self.limit) + 1) * gate * jax.nn.sigmoid(1.702 * gate)

        inside = jax.checkpoint(glu, prevent_cse=False)(layer(GATE_UP, x, 2 * m.width))
        return layer(DOWN, inside, x.shape[-1])


class FusedMixtureBlock(nn.Module):
    """Σ w_e · expert_e(x) over the experts that the router gives a token; none is dropped.

    Args:
        mixture: sizes, and the router's name.
        limit: l of :class:`FusedExperts`.
    """

    mixture: Mixture
    limit: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query hidden"]:
        """Applies the block."""
        m = self.mixture
        return by_experts(
            m, x, Router(m.experts, name=m.router)(x), FusedExperts(m, self.limit, name=EXPERTS)
        )
