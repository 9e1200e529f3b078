"""Calls of transformers' Flax models with adapters, packed documents, and groups of sparse attention."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jax import Array
from transformers import FlaxPreTrainedModel

from hylorada_jax.models.hf.attention import SharedAttention
from hylorada_jax.models.hf.head import float32_logits


def bind(
    model: FlaxPreTrainedModel,
    variables: Mapping[str, Any],
    rngs: Mapping[str, Array] | None = None,
    segment_ids: Array | None = None,
    groups: tuple[int, int] | None = None,
) -> FlaxPreTrainedModel:
    """The model with these variables, whose self-attention and logits are ours.

    transformers' call prepares the inputs of each family, but hands the module nothing besides "params": so
    it gets a stand-in for the module, in a copy of the model, which adds the rest.

    Args:
        model: left as it is.
        variables: {"params": …}, and perhaps further collections, such as the adapters'.
        rngs: keys for dropout inside adapters.
        segment_ids: packed documents [batch, seq], see `SharedAttention`.
        groups: size and shift of shifted sparse attention's groups; None: full attention.

    Returns:
        A model of the same class.
    """
    bound = copy.copy(model)
    bound._module = _Bound(model.module, variables, rngs or {}, segment_ids, groups)
    return bound


@dataclass(frozen=True)
class _Bound:
    """A module whose `apply` adds to what Hugging Face's call gives it, with our attention and logits."""

    module: nn.Module
    variables: Mapping[str, Any]
    rngs: Mapping[str, Array]
    segment_ids: Array | None
    groups: tuple[int, int] | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def apply(self, inputs: Mapping[str, Any], *args: Any, rngs: Mapping[str, Array], **kwargs: Any) -> Any:
        with SharedAttention(self.segment_ids, self.groups), float32_logits():
            return self.module.apply(
                {**inputs, **self.variables}, *args, rngs={**rngs, **self.rngs}, **kwargs
            )
