"""The sparse adapter and its gate as Linen modules, for networks of your own (method.md §4)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hylorada_jax.config import check_dropout
from hylorada_jax.math import sparse
from hylorada_jax.modules.checks import check_hidden, check_sparse


class TopKGate(nn.Module):
    """A mask that leaves the units of largest score on.

        mask_i = 1 if score_i is among the k = max(1, ⌊ratio·adapter_dim⌋) largest, else 0
        ∂mask := ∂(adapter_dim·softmax(scores/τ))                                     (straight-through)

    Attributes:
        adapter_dim: units, ≥ 1.
        topk_ratio: the part of them in (0, 1] that stays on.
        temperature: τ > 0.

    Parameters: gate_scores [adapter_dim] ~ N(0, 0.02²); float32.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> import jax
        >>> mask, params = TopKGate(8, topk_ratio=0.25).init_with_output(jax.random.key(0))
        >>> float(mask.sum())
        2.0

    Source: method.md §4; straight-through estimator: Bengio et al. 2013, §4.
    """

    adapter_dim: int = 128
    topk_ratio: float = 0.1
    temperature: float = 1.0

    @nn.compact
    def __call__(self) -> Float[Array, " units"]:
        """The mask, exactly 0 and 1."""
        check_sparse(self)
        scores = self.param(
            "gate_scores", lambda key: sparse.init_leaves(key, self.adapter_dim, 1)["gate_scores"]
        )
        k = sparse.units_on(self.topk_ratio, self.adapter_dim)
        return sparse.topk_mask(jnp.asarray(scores), k, self.temperature)


class SparseAdapter(nn.Module):
    """A bottleneck on the output of an MLP block, with most of its units off.

        out = h + up(dropout(gelu(down(h) ⊙ mask)))

    Attributes:
        adapter_dim: units, ≥ 1.
        topk_ratio: the part of them in (0, 1] that stays on.
        temperature: τ > 0 of the gate's gradient.
        dropout: probability of dropping a unit; needs an rng named "dropout".

    Parameters: down [adapter_dim, hidden] Kaiming-uniform(a=√5), up [hidden, adapter_dim] zeros, and the
    gate's scores, gate_scores [adapter_dim] ~ N(0, 0.02²); float32.

    Raises:
        ConfigError: a setting is out of range, or h has no features.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> h = jnp.ones((1, 2, 8))
        >>> out, params = SparseAdapter(adapter_dim=4).init_with_output(jax.random.key(0), h)
        >>> bool(jnp.array_equal(out, h))
        True

    Source: method.md §4; bottleneck adapters: Houlsby et al. 2019, §2.1.
    """

    adapter_dim: int = 128
    topk_ratio: float = 0.1
    temperature: float = 1.0
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, h: Float[Array, "*tokens hidden"], deterministic: bool = True
    ) -> Float[Array, "*tokens hidden"]:
        """The block's output with the adapter, in h's dtype."""
        check_sparse(self)
        check_dropout(self.dropout)
        h = jnp.asarray(h)
        check_hidden(self, h.shape[-1])

        def fresh(key: Array, name: str) -> Array:
            return sparse.init_leaves(key, self.adapter_dim, h.shape[-1])[name]

        down, up, scores = (
            jnp.asarray(self.param(name, fresh, name)) for name in ("down", "up", "gate_scores")
        )
        k = sparse.units_on(self.topk_ratio, self.adapter_dim)
        units = sparse.units(h, down, sparse.topk_mask(scores, k, self.temperature))
        units = nn.Dropout(self.dropout)(units, deterministic=deterministic)
        return sparse.add_units(h, units, up)
