"""The forward pass of adapted attention: in the modules that let adapters in, and in Flax's own."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.math.attention import DAA
from hylorada_jax.math.groups import shifted_patterns
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.relative_bias import relative_bias
from hylorada_jax.modules.attention import scaled_and_shifted
from hylorada_jax.modules.checks import check_scores
from hylorada_jax.nnx.adapted import Adapted
from hylorada_jax.nnx.hooks import positions_of
from hylorada_jax.trees import is_traced


class AdaptedAttention(Adapted):
    """The attention of a model whose author left it open, with direct adaptation, or in groups."""

    def _adapted(self, pattern: Pattern) -> tuple[tuple[Pattern, ...], DAA | None]:
        config: HyLoRADAConfig = self.adaptation.config
        if not config.s2_attn_enabled or self.deterministic:
            return (pattern,), daa_of(self)
        if pattern.window is not None:
            raise ModelError(
                "Shifted sparse attention takes the place of full attention.",
                f"attention with a window of {pattern.window}",
                "Set s2_attn_enabled=False.",
            )
        groups = shifted_patterns(
            pattern.query_positions,
            *config.s2_groups(pattern.query_positions.shape[1]),
            segment_ids=pattern.query_segments,
            key_valid=pattern.key_valid,
        )
        return groups, daa_of(self)


class AdaptedScores(Adapted):
    """The scores of a model whose author left them open, with direct adaptation."""

    def __call__(
        self, scores: Array, query_positions: Array | None = None, key_positions: Array | None = None
    ) -> Array:
        """The adapted scores, in the scores' dtype."""
        daa = daa_of(self)
        assert daa is not None
        check_scores(self, scores)
        of_itself = query_positions is None and key_positions is None and scores.shape[2] == scores.shape[3]
        if of_itself and daa.position_bias is not None:
            query_positions = key_positions = positions_of((scores.shape[0], scores.shape[3]), None)
        return scaled_and_shifted(scores, daa, query_positions, key_positions)


class AdaptedMultiHead(Adapted):
    """Flax's multi-head attention with direct adaptation: α goes into the queries, all else into its bias.

    Keys are of the same tokens as queries. Where arrays have no values yet, only their shapes tell.
    """

    def __call__(self, inputs_q: Array, inputs_k: Any = None, inputs_v: Any = None, **options: Any) -> Array:
        """The module's output."""
        other = inputs_k is not None and inputs_k is not inputs_q
        if other and (inputs_k.shape != inputs_q.shape or not is_traced((inputs_q, inputs_k))):
            raise ModelError(
                "Direct attention adaptation is of self-attention.",
                "nnx.MultiHeadAttention with keys of other tokens",
                "Set daa_enabled=False and daa_position_bias=None.",
            )
        return self.hylorada_plain.__call__(self, inputs_q, inputs_k, inputs_v, **options)

    @property
    def attention_fn(self) -> Any:
        """The module's own function, with what the adapter adds."""
        function, daa = vars(self)["attention_fn"], daa_of(self)
        assert daa is not None

        def adapted(query: Array, key: Array, value: Array, bias: Array | None = None, **options: Any) -> Any:
            added = daa.beta[:, None, None] + (0 if bias is None else bias)
            if daa.position_bias is not None:
                added = added + relative_bias(daa.position_bias, *self._places(query, key))
            if query.ndim == 3 and added.ndim == 4:
                added = added[0]
            query = (query * daa.alpha[:, None]).astype(query.dtype)
            return function(query, key, value, bias=added.astype(query.dtype), **options)

        return adapted

    @attention_fn.setter
    def attention_fn(self, function: Any) -> None:
        self.__dict__["attention_fn"] = function

    def _places(self, query: Array, key: Array) -> tuple[Array, Array]:
        """The positions of queries and keys, [batch, seq] or [1, seq]; of a cache they are its slots."""
        if query.shape[-3] != key.shape[-3]:
            return self.cache_index[...][None, None] - 1, jnp.arange(key.shape[-3])[None]
        # Of rows along several axes, or along none, the positions of one are those of all.
        batch = query.shape[:1] if query.ndim == 4 else (1,)
        keys = positions_of((*batch, query.shape[-3]), None)
        return keys, keys


def daa_of(module: Any) -> DAA | None:
    """The direct attention adaptation of an attention module; None where it has none."""
    if not hasattr(module, "alpha"):
        return None
    bias = module.position_bias[...] if hasattr(module, "position_bias") else None
    return DAA(module.alpha[...], module.beta[...], bias)
