"""Attention in Hugging Face's Flax models, computed by the one function that our decoder calls too.

GPT-2, BERT and T5 keep their own projections and KV cache. What lies between them is ours, so that direct
attention adaptation, packed documents and shifted sparse attention act here as in our decoder.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from transformers.models.bert.modeling_flax_bert import FlaxBertSelfAttention
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2Attention
from transformers.models.t5.modeling_flax_t5 import FlaxT5Attention

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.math.attention import DAA, attention
from hylorada_jax.math.groups import attend, shifted_patterns
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.position import default_positions
from hylorada_jax.models.daa import daa_of
from hylorada_jax.models.module_kinds import called_class, register


class SharedAttention:
    """A context, to be entered around one ``module.apply``, in which self-attention is ours.

    Cross-attention, ``output_attentions`` and the base's own dropout are left to Hugging Face's code; where
    that would leave out something that was asked for, it is an error.

    Args:
        segment_ids: packed documents 1, 2, 3 …, 0 for padding (GPT-2 and BERT).
        groups: size and shift of shifted sparse attention (GPT-2); None: full attention.
    """

    def __init__(
        self,
        segment_ids: Int[Array, "batch seq"] | None = None,
        groups: tuple[int, int] | None = None,
    ) -> None:
        self._segment_ids, self._groups = segment_ids, groups
        self._position_ids: Array | None = None
        self._attention_mask: Array | None = None
        self._context = nn.intercept_methods(self._intercept)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def _intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        cls = called_class(context, ATTENTIONS)
        kind: type = type(context.module)
        hands_on = context.method_name == "__call__" and _takes_tokens(kind)
        if cls is None and not hands_on:
            return next_fun(*args, **kwargs)
        bound = inspect.signature(context.orig_method).bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        if cls is None:
            # The model's modules hand these to one another; the last to be called tells what attention sees.
            self._position_ids, self._attention_mask = call["position_ids"], call["attention_mask"]
            return next_fun(*args, **kwargs)
        daa = self._check(context.module, call)
        # T5 without DAA has nothing that its own code would leave out.
        if _needs_theirs(call) or (daa is None and cls is FlaxT5Attention):
            return next_fun(*args, **kwargs)
        return ATTENTIONS[cls](self, context.module, call, daa)

    def _check(self, module: nn.Module, call: Mapping[str, Any]) -> DAA | None:
        """The module's DAA, after refusing what Hugging Face's own attention would ignore."""
        daa, theirs = daa_of(module), _needs_theirs(call)
        packed = self._segment_ids is not None and call["key_value_states"] is None
        grouped = self._groups is not None and call["key_value_states"] is None
        asked = {"direct attention adaptation": daa is not None, "segment_ids": packed, "groups": grouped}
        if theirs and any(asked.values()):
            raise ConfigError(
                "Direct adaptation, packed documents and groups act in self-attention that is ours.",
                f"{', '.join(n for n, is_asked in asked.items() if is_asked)} at {'.'.join(module.path)} "
                f"with {theirs}",
                f"Leave {theirs} out, or what is to act there.",
            )
        return daa

    def _gpt2(self, module: Any, call: Mapping[str, Any], daa: DAA | None) -> tuple[Array]:
        attended = self._attend(module, jnp.split(module.c_attn(call["hidden_states"]), 3, axis=-1), daa)
        return (module.c_proj(module._merge_heads(attended)),)

    def _bert(self, module: Any, call: Mapping[str, Any], daa: DAA | None) -> tuple[Array]:
        states = call["hidden_states"]
        attended = self._attend(module, [module.query(states), module.key(states), module.value(states)], daa)
        if call["layer_head_mask"] is not None:
            attended = attended * call["layer_head_mask"][:, None].astype(attended.dtype)
        return (module._merge_heads(attended),)

    def _attend(self, module: Any, projected: Sequence[Array], daa: DAA | None) -> Array:
        query, key, value = map(module._split_heads, projected)
        start, key, value = _through_cache(module, query, key, value)
        patterns = self._patterns(query, key, start, module.causal)
        return attend(query, key, value, patterns, daa)

    def _patterns(
        self,
        query: Float[Array, "batch query heads head_dim"],
        key: Float[Array, "batch key heads head_dim"],
        start: Int[Array, ""] | None,
        causal: bool,
    ) -> tuple[Pattern, ...]:
        (batch, queries), keys = query.shape[:2], key.shape[1]
        mask, segments = jnp.asarray(self._attention_mask), self._segment_ids
        if mask.shape != (batch, keys):
            raise ModelError(
                "The attention mask must have a column per key.",
                f"a mask {mask.shape} for {keys} keys",
                "Generate with a model that has a KV cache: BERT has one with add_cross_attention=True only.",
            )
        valid = mask > 0 if segments is None else (mask > 0) & (segments > 0)
        # In Hugging Face's generation the padding in front stands at −1.
        positions = jnp.broadcast_to(jnp.maximum(jnp.asarray(self._position_ids), 0), (batch, queries))
        if self._groups is not None:
            return shifted_patterns(positions, *self._groups, key_valid=valid, segment_ids=segments)
        # With a cache the mask is of all slots, and positions are counted from it there.
        key_positions = positions if start is None else default_positions(mask.shape, attention_mask=mask)
        slots = jnp.arange(queries) + (0 if start is None else start)
        return (
            Pattern(
                slots, jnp.arange(keys), positions, key_positions, valid, segments, segments, causal=causal
            ),
        )

    def _t5(self, module: Any, call: Mapping[str, Any], daa: DAA | None) -> tuple[Array, Array]:
        """T5's call with DAA on S = q kᵀ; its relative bias and its mask, both added, come after."""
        states, bias = call["hidden_states"], call["position_bias"]
        query, key, value = (
            module._split_heads(project(states)) for project in (module.q, module.k, module.v)
        )
        batch, queries = query.shape[:2]
        start, key, value = _through_cache(module, query, key, value)
        slots, keys = jnp.arange(queries) + (0 if start is None else start), jnp.arange(key.shape[1])
        positions = jnp.broadcast_to(slots, (batch, queries)), jnp.broadcast_to(keys, key.shape[:2])
        sees_all = Pattern(slots, keys, *positions, causal=False)
        if bias is None:  # the first layer makes it for all of them
            mask = call["attention_mask"]
            bias = module._create_position_bias(
                key, query, None, call["init_cache"], queries, 0 if start is None else start
            )
            valid = None if mask is None else mask > 0
            visible = replace(sees_all, key_valid=valid, causal=module.causal).mask()
            bias = bias + jnp.where(visible, 0, jnp.finfo(module.dtype).min).astype(module.dtype)
        attended = attention(query, key, value, sees_all, daa=daa, bias=bias, scale=1.0)
        return module.o(module._merge_heads(attended)), bias


ATTENTIONS: dict[type, Callable[..., tuple[Array, ...]]] = {
    FlaxGPT2Attention: SharedAttention._gpt2,
    FlaxBertSelfAttention: SharedAttention._bert,
    FlaxT5Attention: SharedAttention._t5,
}
for _cls in ATTENTIONS:
    register(_cls, "attention")


@functools.cache
def _takes_tokens(kind: type) -> bool:
    return {"position_ids", "attention_mask"} <= set(inspect.signature(kind.__call__).parameters)


def _needs_theirs(call: Mapping[str, Any]) -> str:
    """What in a call of attention is left to Hugging Face's own code; "" where nothing is."""
    if call["key_value_states"] is not None:
        return "cross-attention"
    if call["output_attentions"]:
        return "output_attentions=True"
    return "" if call["deterministic"] else "the base's own dropout (train=True)"


def _through_cache(
    module: Any, query: Array, key: Array, value: Array
) -> tuple[Int[Array, ""] | None, Array, Array]:
    """Where the queries begin, and the keys and values of all slots; None without a cache."""
    if not (module.causal and module.has_variable("cache", "cached_key")):
        return None, key, value
    start = module.get_variable("cache", "cache_index")
    key, value, _ = module._concatenate_to_cache(key, value, query, None)
    return start, key, value
