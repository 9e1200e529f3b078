"""Direct attention adaptation and shifted sparse attention as NNX modules (method.md §§3, 6)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from hylorada_jax.math.attention import DAA
from hylorada_jax.math.position import NUM_BUCKETS
from hylorada_jax.modules.attention import scaled_and_shifted, shifted_sparse_attention
from hylorada_jax.modules.checks import check_heads, check_scores
from hylorada_jax.nnx.variables import AdapterParam


class DirectAttentionAdapter(nnx.Module):
    """A learned scale and shift of every head's attention scores, before the mask and the softmax.

        S'_h = α_h·S_h + β_h

    Args, errors and source: :class:`hylorada_jax.DirectAttentionAdapter`. ``rngs`` is taken as by every NNX
    module, and not read: nothing here starts at random.

    Example:
        >>> scores = jnp.ones((1, 4, 2, 2))
        >>> bool(jnp.array_equal(DirectAttentionAdapter(4)(scores), scores))
        True
    """

    def __init__(self, num_heads: int, per_head: bool = True, *, rngs: nnx.Rngs | None = None) -> None:
        self.num_heads = num_heads
        check_heads(self)
        heads = num_heads if per_head else 1
        self.alpha = AdapterParam(jnp.ones(heads), component="daa")
        self.beta = AdapterParam(jnp.zeros(heads), component="daa")

    def __call__(
        self, scores: Float[Array, "batch heads query key"]
    ) -> Float[Array, "batch heads query key"]:
        """The adapted scores, in the scores' dtype."""
        return self._adapted(scores)

    def _adapted(self, scores: Array, *positions: Array | None, table: Array | None = None) -> Array:
        scores = jnp.asarray(scores)
        check_scores(self, scores)
        return scaled_and_shifted(scores, DAA(self.alpha[...], self.beta[...], table), *positions)


class PositionalDAA(DirectAttentionAdapter):
    """Direct attention adaptation with a learned bias for each head and bucket of distances.

        S'_h = α_h·S_h + β_h + position_bias[bucket(q − k), h]

    Args, errors and source: :class:`hylorada_jax.PositionalDAA`.

    Example:
        >>> layer = PositionalDAA(4)
        >>> layer(jnp.ones((1, 4, 2, 2))).shape, layer.position_bias.shape
        ((1, 4, 2, 2), (64, 4))
    """

    def __init__(self, num_heads: int, per_head: bool = True, *, rngs: nnx.Rngs | None = None) -> None:
        super().__init__(num_heads, per_head)
        self.position_bias = AdapterParam(jnp.zeros((NUM_BUCKETS, *self.alpha.shape)), component="daa")

    def __call__(
        self,
        scores: Float[Array, "batch heads query key"],
        query_positions: Int[Array, "batch query"] | None = None,
        key_positions: Int[Array, "batch key"] | None = None,
    ) -> Float[Array, "batch heads query key"]:
        """The adapted scores, in the scores' dtype; without positions they are 0, 1, 2 …"""
        return self._adapted(scores, query_positions, key_positions, table=self.position_bias[...])


class ShiftedSparseAttention(nnx.Module):
    """Attention inside groups of tokens, which are shifted for the last half of the heads (S²-Attn).

        first heads:  [0, G), [G, 2G), …            last ⌊heads/2⌋:  [0, shift), [shift, shift + G), …

    Args, errors and source: :class:`hylorada_jax.ShiftedSparseAttention`. It has no variables.

    Example:
        >>> query, key = jnp.ones((1, 10, 4, 8)), jnp.ones((1, 10, 2, 8))
        >>> ShiftedSparseAttention(group_size=4)(query, key, key).shape
        (1, 10, 4, 8)
    """

    def __init__(self, group_size: int, shift_ratio: float = 0.5, *, rngs: nnx.Rngs | None = None) -> None:
        self.group_size, self.shift_ratio = group_size, shift_ratio

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        key_valid: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The attended values, in query's dtype; query head h reads key-value head ⌊h·kv_heads/heads⌋."""
        return shifted_sparse_attention(
            query, key, value, positions, segment_ids, key_valid, self.group_size, self.shift_ratio
        )
