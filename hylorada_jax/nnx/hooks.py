"""Where a model's own attention lets adapters in: plain attention, until :func:`adapt` finds it."""

from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.math.attention import DAA
from hylorada_jax.math.groups import attend
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.modules.checks import token_positions
from hylorada_jax.nnx.tokens import known_positions
from hylorada_jax.shapes import check_attention
from hylorada_jax.trees import is_traced


class Attention(nnx.Module):
    """Causal self-attention over whole rows, which adapters can reach; it has no variables of its own.

        softmax(α_h·q kᵀ·scale + β_h + position_bias[bucket(q − k), h]) v       α = 1, β = position_bias = 0

    Direct attention adaptation learns α, β and position_bias; shifted sparse attention, while the model
    trains, attends in groups. In adapters' files its leaves bear the name of the module that holds it.

    Args:
        num_heads: query heads.
        rngs: taken as by every NNX module, and not read.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = jnp.ones((1, 10, 4, 8)), jnp.ones((1, 10, 2, 8))
        >>> Attention(4)(query, key, key).shape
        (1, 10, 4, 8)

    Source: method.md §§3, 6.
    """

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs | None = None) -> None:
        self.num_heads = num_heads
        self.deterministic = False

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
        *,
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        key_valid: Bool[Array, "batch seq"] | None = None,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The attended values; query head h reads key-value head ⌊h·kv_heads/heads⌋.

        Args:
            query: queries, rotated where the model rotates them.
            key: keys of the same tokens.
            value: their values.
            positions: of the tokens; by default those that the model was called with, or of :func:`tokens`.
            segment_ids: the document of every token; a token sees its own alone.
            key_valid: False for padding.
            window: a token sees itself and the window − 1 tokens before it; None: all of them.
            scale: of the scores; None takes 1/√head_dim.
            soft_cap: bound of the scores before anything is added to them.

        Raises:
            DataError: keys or values are of other tokens, as with a KV cache; or an argument has another
                shape.
            ConfigError: the queries have another number of heads, or no multiple of the keys'; or window < 1.
        """
        if query.shape[2:3] != (self.num_heads,):
            raise ConfigError(
                "Attention: queries are [batch, seq, num_heads, head_dim].",
                f"queries {query.shape}, num_heads={self.num_heads}",
                "Give num_heads the number of query heads.",
            )
        if not key.shape[:2] == value.shape[:2] == query.shape[:2]:
            raise DataError(
                "Attention is of whole rows: keys and values are those of the queries' tokens.",
                f"queries {query.shape}, keys {key.shape}, values {value.shape}",
                "With a KV cache, call AttentionScores on the scores.",
            )
        check_attention(query, key, value, segment_ids=segment_ids, key_valid=key_valid)
        if window is not None and not is_traced(window) and window < 1:
            raise ConfigError("window is ≥ 1, for a token sees itself.", window, "Give None for no window.")
        counted = positions is None and known_positions(query.shape[:2]) is None
        positions = positions_of(query.shape[:2], positions)
        pattern = Pattern.of_rows(
            positions, key_valid=key_valid, segment_ids=segment_ids, window=window, counted=counted
        )
        patterns, daa = self._adapted(pattern)
        return attend(query, key, value, patterns, daa, scale=scale, soft_cap=soft_cap)

    def _adapted(self, pattern: Pattern) -> tuple[tuple[Pattern, ...], DAA | None]:
        """Which keys each query sees, and the direct adaptation: here neither is changed."""
        return (pattern,), None


class AttentionScores(nnx.Module):
    """The scores of a model's own attention, before its mask and softmax; it has no variables of its own.

        S' = α_h·S + β_h + position_bias[bucket(q − k), h]                      α = 1, β = position_bias = 0

    For attention that :class:`Attention` is not, such as with a KV cache. Direct attention adaptation learns
    α, β and position_bias; shifted sparse attention needs queries and keys, which are not here.

    Args:
        num_heads: query heads.
        rngs: taken as by every NNX module, and not read.

    Example:
        >>> import jax.numpy as jnp
        >>> scores = jnp.ones((1, 4, 2, 2))
        >>> AttentionScores(4)(scores) is scores
        True

    Source: method.md §3.
    """

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs | None = None) -> None:
        self.num_heads = num_heads

    def __call__(
        self,
        scores: Float[Array, "batch heads query key"],
        query_positions: Int[Array, "batch query"] | None = None,
        key_positions: Int[Array, "batch key"] | None = None,
    ) -> Float[Array, "batch heads query key"]:
        """The scores; positions are by default those that the model was called with, or of `tokens`."""
        return scores


def positions_of(tokens: tuple[int, ...], given: Array | None) -> Array:
    """The checked positions of tokens [batch, seq]: as given, else of the model's call, else 0, 1, 2 …

    Outside of the model's call, they are those that the context around gives.

    Raises:
        DataError: somebody gave the model positions, and they are of other tokens.
    """
    if given is None:
        given = known_positions(tokens)
        if given is not None and given.shape != tokens:
            raise DataError(
                "Attention has the positions that the model was called with where it sees the same tokens.",
                f"positions {given.shape}, attention over {tokens}, such as with a prefix",
                "Give positions= to Attention, query_positions= and key_positions= to AttentionScores; "
                "or set daa_position_bias=False.",
            )
    return token_positions(given, tokens)
