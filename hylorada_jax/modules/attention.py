"""Direct attention adaptation and shifted sparse attention as Linen modules (method.md §§3, 6).

For networks of your own. Attached to a whole model, :class:`hylorada_jax.HyLoRADAModel` adapts inside the
model's own attention, where the position bias is gathered and never stored.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math.attention import DAA, leaf_shapes
from hylorada_jax.math.groups import attend, shifted_patterns
from hylorada_jax.math.relative_bias import relative_bias
from hylorada_jax.modules.checks import check_scores, score_positions, token_positions
from hylorada_jax.shapes import check_attention


def scaled_and_shifted(
    scores: Float[Array, "batch heads query key"],
    daa: DAA,
    query_positions: Int[Array, "batch query"] | None = None,
    key_positions: Int[Array, "batch key"] | None = None,
) -> Float[Array, "batch heads query key"]:
    """α_h·S_h + β_h + position_bias[bucket(q − k), h], in the scores' dtype.

    Only the bias reads positions; without any they are 0, 1, 2 …
    """
    adapted = daa.alpha[:, None, None] * scores + daa.beta[:, None, None]
    if daa.position_bias is not None:
        places = score_positions(scores, query_positions, key_positions)
        adapted = adapted + relative_bias(daa.position_bias, *places)
    return adapted.astype(scores.dtype)


class DirectAttentionAdapter(nn.Module):
    """A learned scale and shift of every head's attention scores, before the mask and the softmax.

        S'_h = α_h·S_h + β_h

    β alone changes nothing: the softmax of a row does not see a constant added to all of it. It is kept
    because the method has it; what adapts is α, the temperature of each head.

    Attributes:
        num_heads: query heads.
        per_head: one α and β per head; otherwise one of each for all.

    Parameters: alpha [num_heads] ones and beta [num_heads] zeros ([1] with per_head=False); float32.

    Raises:
        ConfigError: the scores have another number of heads.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> scores = jnp.ones((1, 4, 2, 2))
        >>> adapted, params = DirectAttentionAdapter(4).init_with_output(jax.random.key(0), scores)
        >>> bool(jnp.array_equal(adapted, scores))
        True

    Source: method.md §3.
    """

    num_heads: int
    per_head: bool = True

    @nn.compact
    def __call__(
        self, scores: Float[Array, "batch heads query key"]
    ) -> Float[Array, "batch heads query key"]:
        """The adapted scores, in the scores' dtype."""
        return self._adapted(scores)

    def _adapted(self, scores: Array, *positions: Array | None, position_bias: bool = False) -> Array:
        scores = jnp.asarray(scores)
        check_scores(self, scores)
        shapes = leaf_shapes(self.num_heads if self.per_head else 1, position_bias=position_bias)

        def leaf(name: str) -> Array:
            start = nn.initializers.ones if name == "alpha" else nn.initializers.zeros
            return jnp.asarray(self.param(name, start, shapes[name], jnp.float32))

        return scaled_and_shifted(scores, DAA(*map(leaf, shapes)), *positions)


class PositionalDAA(DirectAttentionAdapter):
    """Direct attention adaptation with a learned bias for each head and bucket of distances.

        S'_h = α_h·S_h + β_h + position_bias[bucket(q − k), h]

    Parameters: DirectAttentionAdapter's, and position_bias [64, num_heads] zeros ([64, 1] with
    per_head=False).

    Raises:
        ConfigError: the scores have another number of heads.
        DataError: positions are not integers ≥ 0 of the scores' shape, or missing where queries and keys are
            not the same tokens.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> scores = jnp.ones((1, 4, 2, 2))
        >>> adapted, params = PositionalDAA(4).init_with_output(jax.random.key(0), scores)
        >>> params["params"]["position_bias"].shape
        (64, 4)

    Source: method.md §§2–3; the buckets are T5's (Raffel et al. 2020, §2.1).
    """

    @nn.compact
    def __call__(
        self,
        scores: Float[Array, "batch heads query key"],
        query_positions: Int[Array, "batch query"] | None = None,
        key_positions: Int[Array, "batch key"] | None = None,
    ) -> Float[Array, "batch heads query key"]:
        """The adapted scores, in the scores' dtype; without positions they are 0, 1, 2 …"""
        return self._adapted(scores, query_positions, key_positions, position_bias=True)


class ShiftedSparseAttention(nn.Module):
    """Attention inside groups of tokens, which are shifted for the last half of the heads (S²-Attn).

        first heads:  [0, G), [G, 2G), …            last ⌊heads/2⌋:  [0, shift), [shift, shift + G), …

    A token sees the tokens of its group that are not later, of its own document, and no padding: also in
    the groups at either end, which do not wrap around. Rows may have any length. For training: a model
    trained so is evaluated and generates with full attention. It has no parameters. Called with query
    [batch, seq, heads, head_dim], key and value [batch, seq, kv_heads, head_dim], and [batch, seq] of
    ``positions``, which only DAA reads, ``segment_ids``, each token's document, and ``key_valid``, False for
    padding.

    Attributes:
        group_size: G, such that shift = shift_ratio·G is a whole number.
        shift_ratio: in (0, 1).

    Raises:
        ConfigError: the group size or the head counts do not fit.
        DataError: query, key, value, positions, segment_ids or key_valid disagree in shape.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = jnp.ones((1, 10, 4, 8)), jnp.ones((1, 10, 2, 8))
        >>> ShiftedSparseAttention(group_size=4).apply({}, query, key, key).shape
        (1, 10, 4, 8)

    Source: Chen et al. 2024 (LongLoRA), arXiv:2309.12307 §3.2; method.md §6.
    """

    group_size: int
    shift_ratio: float = 0.5

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


def shifted_sparse_attention(
    query: Array,
    key: Array,
    value: Array,
    positions: Array | None,
    segment_ids: Array | None,
    key_valid: Array | None,
    group_size: int,
    shift_ratio: float,
) -> Array:
    """What :class:`ShiftedSparseAttention` computes."""
    query, key, value = (jnp.asarray(given) for given in (query, key, value))
    check_attention(query, key, value, segment_ids=segment_ids, key_valid=key_valid)
    tokens = query.shape[:2]
    positions = token_positions(positions, tokens)
    # Its settings are the config's, which knows which of them fit.
    settings = HyLoRADAConfig(method="longlora", s2_group_size=group_size, s2_shift_ratio=shift_ratio)
    patterns = shifted_patterns(
        positions,
        *settings.s2_groups(tokens[1]),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
        key_valid=None if key_valid is None else jnp.asarray(key_valid, bool),
    )
    return attend(query, key, value, patterns)
