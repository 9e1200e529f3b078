"""The sparse adapter and its gate as NNX modules (method.md §4)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from hylorada_jax.math import sparse
from hylorada_jax.modules.checks import check_hidden, check_sparse
from hylorada_jax.nnx.streams import checked_dropout
from hylorada_jax.nnx.variables import AdapterParam


class TopKGate(nnx.Module):
    """A mask that leaves the units of largest score on.

        mask_i = 1 if score_i is among the k = max(1, ⌊ratio·adapter_dim⌋) largest, else 0
        ∂mask := ∂(adapter_dim·softmax(scores/τ))                                     (straight-through)

    Args, errors and source: :class:`hylorada_jax.TopKGate`.

    Example:
        >>> float(TopKGate(8, topk_ratio=0.25, rngs=nnx.Rngs(0))().sum())
        2.0
    """

    def __init__(
        self,
        adapter_dim: int = 128,
        topk_ratio: float = 0.1,
        temperature: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.adapter_dim, self.topk_ratio, self.temperature = adapter_dim, topk_ratio, temperature
        check_sparse(self)
        scores = sparse.init_leaves(rngs.params(), adapter_dim, 1)["gate_scores"]
        self.gate_scores = AdapterParam(scores, component="sparse")

    def __call__(self) -> Float[Array, " units"]:
        """The mask, exactly 0 and 1."""
        k = sparse.units_on(self.topk_ratio, self.adapter_dim)
        return sparse.topk_mask(self.gate_scores[...], k, self.temperature)


class SparseAdapter(nnx.Module):
    """A bottleneck on the output of an MLP block, with most of its units off.

        out = h + up(dropout(gelu(down(h) ⊙ mask)))

    Args, errors and source: :class:`hylorada_jax.SparseAdapter`; ``hidden_size`` is the width of h, which the
    Linen module reads off its first call. ``rngs`` without a stream that it draws from are a ConfigError, as
    is a ``hidden_size`` below 1, or an h of another width.

    Example:
        >>> h = jnp.ones((1, 2, 8))
        >>> bool(jnp.array_equal(SparseAdapter(8, adapter_dim=4, rngs=nnx.Rngs(0))(h), h))
        True
    """

    def __init__(
        self,
        hidden_size: int,
        adapter_dim: int = 128,
        topk_ratio: float = 0.1,
        temperature: float = 1.0,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.adapter_dim, self.topk_ratio, self.temperature = adapter_dim, topk_ratio, temperature
        check_sparse(self)
        check_hidden(self, hidden_size)
        self.dropout = checked_dropout(dropout, rngs)
        for name, leaf in sparse.init_leaves(rngs.params(), adapter_dim, hidden_size).items():
            setattr(self, name, AdapterParam(leaf, component="sparse"))

    def __call__(
        self, h: Float[Array, "*tokens hidden_size"], deterministic: bool | None = None
    ) -> Float[Array, "*tokens hidden_size"]:
        """The block's output with the adapter, in h's dtype."""
        h, k = jnp.asarray(h), sparse.units_on(self.topk_ratio, self.adapter_dim)
        check_hidden(self, self.up[...].shape[0], h)
        mask = sparse.topk_mask(self.gate_scores[...], k, self.temperature)
        units = sparse.units(h, self.down[...], mask)
        return sparse.add_units(h, self.dropout(units, deterministic=deterministic), self.up[...])
