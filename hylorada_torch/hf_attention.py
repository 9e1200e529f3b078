"""Direct adaptation and shifted groups inside the attention of transformers' models."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.models.families import DECODERS
from hylorada_torch.attention import DirectAttentionAdapter, PositionalDAA, attend, same_group
from hylorada_torch.forward_pass import Passes
from hylorada_torch.settings import s2_groups

# Classes of transformers, by name: to import their files loads every other framework that is installed.
CAUSAL = (
    "GPT2Attention",
    *(
        decoder.causal_lm.removesuffix("ForCausalLM") + part + "Attention"
        for decoder in DECODERS.values()
        for part in ("", "Text")  # the text part of a multimodal family
    ),
)
BERT = ("BertSelfAttention", "BertSdpaSelfAttention")
T5 = "T5Attention"


class AdaptedAttention(nn.Module):
    """What one self-attention does between its projections: `attend`, adapted, in training also in groups.

    Args:
        daa: adapts the logits, if not None.
        groups: the number of tokens → (group size, shift) of S²-Attn, which is for training alone; None: off.
        passes: tells the position ids.
    """

    def __init__(
        self,
        daa: DirectAttentionAdapter | None,
        groups: Callable[[int], tuple[int, int]] | None,
        passes: Passes,
    ) -> None:
        super().__init__()
        self.daa, self.groups, self.passes = daa, groups, passes

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The attended values [batch, query, heads, head_dim].

        Args:
            query: [batch, heads, query, head_dim].
            key: [batch, kv_heads, key, head_dim].
            value: [batch, kv_heads, key, head_dim].
            mask: bool (True: visible) or float (added to the logits), [batch or 1, heads or 1, query, key].
            bias: also added to the logits, [1, heads, query, key]: T5's positions.
            **options: scale, soft_cap, sinks and dropout of `attend`.
        """
        visible = mask
        if mask is not None and mask.dtype != torch.bool:
            visible, bias = None, mask if bias is None else mask + bias
        if self.training and self.groups is not None:
            seq = key.shape[2]
            together = same_group(query.shape[1], seq, *self.groups(seq))[:, -query.shape[2] :]
            together = together.to(query.device)
            visible = together if visible is None else visible & together
        now = self.passes.current
        positions = (now.positions, now.key_positions)
        if now.key_positions is not None:  # the cache of a sliding window forgets the oldest keys
            positions = (now.positions, now.key_positions[:, -key.shape[2] :])
        attended = attend(query, key, value, visible, daa=self.daa, positions=positions, bias=bias, **options)
        return attended.transpose(1, 2)


def check_attentions(model: Any, names: list[str], config: HyLoRADAConfig) -> None:
    """Refuse the self-attention modules that `adapt_attention` could not adapt rightly.

    Args:
        model: the model that they are in.
        names: their names.
        config: ``s2_attn_enabled`` is read.

    Raises:
        ModelError: an attention is of an unknown class, or computes something else.
        ConfigError: S²-Attn is asked of a model that is not causal, or whose heads cannot be halved.
    """
    for attention in map(model.get_submodule, names):
        kind = type(attention).__name__
        # What would make the attention of a known class another formula than `attend`.
        plain = {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "position_embedding_type": "absolute",
        }
        different = [name for name, value in plain.items() if getattr(attention, name, value) != value]
        if different or kind not in (*CAUSAL, *BERT, T5) or (kind in BERT and attention.is_decoder):
            raise ModelError(
                f"The reference adapts {', '.join(CAUSAL)}, BERT's attention as an encoder, and T5's.",
                f"{kind} {', '.join(different)}".rstrip(),
                "Set daa_enabled and s2_attn_enabled to False for this model; a method may have them on.",
            )
        heads = model.config.num_attention_heads
        if config.s2_attn_enabled and (heads < 2 or kind not in CAUSAL):
            raise ConfigError(
                "Shifted sparse attention is for causal models, and halves the heads of a layer.",
                f"{kind} of {heads} heads",
                "Leave s2_attn_enabled out.",
            )


def adapt_attention(model: Any, name: str, config: HyLoRADAConfig, passes: Passes) -> AdaptedAttention:
    """Give a self-attention module of a transformers model an `AdaptedAttention`, as its ``hylorada``.

    Args:
        model: GPT-2, BERT, T5 or one that our decoder reads; changed in place.
        name: of the self-attention, which `check_attentions` has passed.
        config: ``daa_*`` and ``s2_*`` are read.
        passes: of the model.

    Returns:
        What was attached.
    """
    attention = model.get_submodule(name)
    daa = None
    if config.daa_enabled:
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        kind = PositionalDAA if config.daa_position_bias else DirectAttentionAdapter
        daa = kind(model.config.num_attention_heads, config.daa_per_head, dtype=dtype)
        daa.to(next(attention.parameters()).device)
    groups = functools.partial(s2_groups, config) if config.s2_attn_enabled else None
    attention.hylorada = AdaptedAttention(daa, groups, passes)
    if written_out := _WRITTEN_OUT.get(type(attention).__name__):
        attention.forward = types.MethodType(written_out, attention)
    else:
        from transformers import AttentionInterface

        # These models look their attention function up by a name in their config, which may also be
        # another model's.
        AttentionInterface.register("hylorada", _interface_forward)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "hylorada"
    return attention.hylorada


def _interface_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    queries, keys = query.shape[2], key.shape[2]
    if type(module).__name__ == T5 and queries != keys:
        raise _no_cache()
    if attention_mask is None and module.is_causal:  # transformers leaves a mask out that is merely causal
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    options = {"scale": scaling, "dropout": dropout, "bias": position_bias}
    options |= {"soft_cap": softcap, "sinks": s_aux}
    return module.hylorada(query, key, value, attention_mask, **options), None


def _no_cache() -> ModelError:
    return ModelError(
        "DAA in T5 does not go with a cache.", "a forward pass with a cache", "Pass use_cache=False."
    )


# In transformers 4, BERT and T5 have no such name: their attention, written out.


def _bert_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        for layer in (self.query, self.key, self.value)
    )
    dropout = self.dropout.p if self.training else 0.0
    return self.hylorada(query, key, value, attention_mask, dropout=dropout).flatten(2), None


def _t5_forward(
    self: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    if past_key_values is not None:
        raise _no_cache()
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        for layer in (self.q, self.k, self.v)
    )
    if position_bias is None:  # the first layer makes it, mask included; the others are handed it
        seq = hidden_states.shape[1]
        position_bias = self.compute_bias(seq, seq)
        position_bias = position_bias if mask is None else position_bias + mask[..., :seq]
    # T5 does not divide its logits by √head_dim.
    dropout = self.dropout if self.training else 0.0
    attended = self.hylorada(query, key, value, position_bias, scale=1.0, dropout=dropout)
    return self.o(attended.flatten(2)), position_bias


_WRITTEN_OUT: dict[str, Callable[..., Any]] = (
    {T5: _t5_forward} | dict.fromkeys(BERT, _bert_forward) if transformers.__version__ < "5" else {}
)
