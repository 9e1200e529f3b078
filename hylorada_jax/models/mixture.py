"""A mixture of experts, in a layer's MLP's place or beside it: a router, and a few experts for each token."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from hylorada_jax.math import experts
from hylorada_jax.math.quantized import Kernel
from hylorada_jax.math.remat import named_output
from hylorada_jax.models.dense import Dense, promote_dtype
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.module_kinds import register
from hylorada_jax.placement.axes import ROWS
from hylorada_jax.placement.shards import cut, row_groups

EXPERTS = "experts"
"""The module whose layers have an axis of experts behind that of the layers; HF numbers them after it."""


class ExpertDense(nn.Module):
    """One linear layer of all experts, y_r = x_r · kernel[expert of r], without bias."""

    count: int
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "groups rows d_in"], rows: experts.Rows
    ) -> Float[Array, "groups rows d_out"]:
        """Applies the layer to rows sorted by expert."""
        shape = self.count, x.shape[-1], self.features
        kernel: Kernel = self.param("kernel", nn.initializers.normal(), shape, jnp.float32)
        x, kernel, _ = promote_dtype(x, kernel, None)
        return named_output(experts.experts_dot(x, kernel, rows))


register(ExpertDense, "experts")


class Experts(nn.Module):
    """The experts, each a gated feed-forward block, down(act(gate(x)) ⊙ up(x))."""

    mixture: Mixture
    gated: Callable[[Array, Array], Array]

    @nn.compact
    def __call__(
        self, x: Float[Array, "groups rows hidden"], rows: experts.Rows
    ) -> Float[Array, "groups rows hidden"]:
        """Applies the experts to rows sorted by expert."""
        m = self.mixture
        gate, up, down = m.layers
        inside = self.gated(*(ExpertDense(m.experts, m.width, name=name)(x, rows) for name in (gate, up)))
        return ExpertDense(m.experts, x.shape[-1], name=down)(inside, rows)


class MixtureBlock(nn.Module):
    """Σ w_e · expert_e(x) over the experts that the router gives a token; none is dropped.

    With a shared expert that all tokens pass, σ(gate(x)) · shared(x) is added.

    Args:
        mixture: sizes and names.
        gated: (gate, up) → act(gate) ⊙ up.
        shared: makes the shared expert, by its name; None: there is none.
    """

    mixture: Mixture
    gated: Callable[[Array, Array], Array]
    shared: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch query hidden"]) -> Float[Array, "batch query hidden"]:
        """Applies the block."""
        m = self.mixture
        logits = Dense(m.experts, use_bias=False, name=m.router)(x)
        y = by_experts(m, x, logits, Experts(m, self.gated, name=EXPERTS))
        if self.shared is None:
            return y
        gate = nn.sigmoid(Dense(1, use_bias=False, name="shared_expert_gate")(x))
        return y + gate * self.shared(name="shared_expert")(x)


def by_experts(
    m: Mixture,
    x: Float[Array, "batch query hidden"],
    logits: Float[Array, "batch query experts"],
    run: Callable[[Array, experts.Rows], Array],
    factor: Float[Array, " experts"] | None = None,
) -> Float[Array, "batch query hidden"]:
    """Σ w_e · expert_e(x), where ``run`` gives what each of the rows sorted by expert becomes.

    ``factor`` multiplies each expert's w_e, after these were made to sum to 1.
    """
    shape = x.shape
    # Tokens are sorted within what no two devices share.
    groups = row_groups(shape[0])
    x, logits = (cut(each.reshape(groups, -1, each.shape[-1]), ROWS) for each in (x, logits))
    weights, chosen = experts.route(logits, m.chosen, normalised=m.normalised)
    if factor is not None:
        weights = weights * factor[chosen]
    rows = experts.sort_rows(chosen, m.experts)
    return experts.sum_rows(run(experts.rows_of(x, rows), rows), weights, rows).reshape(shape)


def each_expert(name: str, count: int) -> list[str]:
    """HF's names of a layer that all experts have, one for each.

    Example:
        >>> each_expert("model.layers.3.mlp.experts.up_proj", 2)
        ['model.layers.3.mlp.experts.0.up_proj', 'model.layers.3.mlp.experts.1.up_proj']
    """
    before, _, layer = name.rpartition(".")
    return [f"{before}.{number}.{layer}" for number in range(count)]
