"""The models that a user brings, as base models."""

from typing import Any

from flax import nnx

from hylorada_jax.errors import ModelError
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.causal_lm import CausalLM

# The files of HF's Flax models and of what wraps them, which are imported when such a model is at hand.
_HF = ("transformers.modeling_flax_utils", "hylorada_jax.models.hf.base")


def as_base(model: Any) -> BaseModel:
    """A user's model as a :class:`BaseModel`.

    Args:
        model: a :class:`CausalLM`, or one of HF's Flax models.

    Raises:
        ModelError: the model is neither, or is known to compute wrongly for its config.
    """
    if isinstance(model, CausalLM):
        return model
    if any(cls.__module__ in _HF for cls in type(model).__mro__):
        from hylorada_jax.models.hf.base import HFFlaxModel  # imports transformers

        return HFFlaxModel.wrap(model)
    nnx_call = "An NNX model is adapted by hylorada_jax.nnx.adapt(model, config, rngs)."
    raise ModelError(
        "A base model must be a CausalLM or one of HF's Flax models.",
        type(model).__name__,
        nnx_call if isinstance(model, nnx.Module) else "Load it with hylorada_jax.load_model(name).",
    )
