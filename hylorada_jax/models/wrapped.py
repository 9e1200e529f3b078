"""The models that a user brings, as base models."""

from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.causal_lm import CausalLM


def as_base(model: Any) -> BaseModel:
    """A user's model as a :class:`BaseModel`.

    Args:
        model: a :class:`CausalLM`, or one of HF's Flax models.

    Raises:
        ModelError: the model is neither, or is known to compute wrongly for its config.
    """
    if isinstance(model, CausalLM) or type(model).__name__ == "HFFlaxModel":
        return model
    if any(cls.__name__ == "FlaxPreTrainedModel" for cls in type(model).__mro__):
        from hylorada_jax.models.hf_flax import HFFlaxModel  # imports transformers

        return HFFlaxModel.wrap(model)
    raise ModelError(
        "A base model must be a CausalLM or one of HF's Flax models",
        type(model).__name__,
        "Load it with hylorada_jax.load_model(name).",
    )
