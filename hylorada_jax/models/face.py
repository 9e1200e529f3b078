"""The one face that every base model shows, ours or HF's."""

from typing import Any, Protocol

from jax import Array

from hylorada_jax.errors import ModelError
from hylorada_jax.models.causal_lm import CausalLM


class BaseModel(Protocol):
    """What adapters, training and evaluation ask of a base model; every method is a pure function."""

    name: str
    params: Any
    config: Any
    supports_segments: bool

    def init_params(self, rng: Array) -> Any:
        """Fresh random parameters; traced to learn the model's modules and shapes."""

    def forward(self, variables: Any, input_ids: Array, **inputs: Any) -> Any:
        """The output with ``.logits`` [batch, seq, vocab]."""

    def hidden(self, variables: Any, input_ids: Array, **inputs: Any) -> Array:
        """The states [batch, seq, d] that the output head reads."""

    def head(self, variables: Any) -> Array:
        """The output embedding [vocab, d]."""

    def generate(self, prompts: Any, **settings: Any) -> list[list[int]]:
        """The new tokens of every prompt."""

    def with_params(self, params: Any) -> Any:
        """The model, as the user gave it, with other parameters."""


def as_base(model: Any) -> BaseModel:
    """The face of a base model.

    Args:
        model: a :class:`CausalLM`, or one of HF's Flax models.

    Raises:
        ModelError: the model is neither, or is known to compute wrongly for its config.
    """
    if isinstance(model, CausalLM):
        return model
    if any(cls.__name__ == "FlaxPreTrainedModel" for cls in type(model).__mro__):
        from hylorada_jax.models.hf_flax import HFFlaxModel  # imports transformers

        return HFFlaxModel.wrap(model)
    raise ModelError(
        "A base model must be a CausalLM or one of HF's Flax models",
        type(model).__name__,
        "Load it with hylorada_jax.load_model(name).",
    )
