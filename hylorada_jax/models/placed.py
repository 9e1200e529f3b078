"""A base model on a mesh."""

from typing import Any

from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.placement.placement import Placement


def fitted(placement: Placement, model: Any) -> Placement:
    """A placement that cuts no attention head of a model.

    Args:
        placement: of any model.
        model: perhaps without its weights. Hugging Face's Flax models have no rule that cuts heads.

    Raises:
        ConfigError: the mesh's axis tensor does not divide the heads.
    """
    if not isinstance(model, CausalLM):
        return placement
    return placement.for_heads(model.config.num_attention_heads, model.config.num_key_value_heads)


def placed(base: BaseModel, placement: Placement) -> BaseModel:
    """The base model with its parameters where a placement puts them; as :func:`fitted` raises."""
    return as_base(base.with_params(fitted(placement, base).put(base.params)))
