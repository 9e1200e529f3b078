"""The one face that every base model shows, ours or HF's."""

from typing import Any, Protocol

import jax
from jax import Array

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.models.causal_lm import CausalLM


class BaseModel(Protocol):
    """What adapters, training and evaluation ask of a base model.

    Inputs beside the tokens are attention_mask, position_ids and segment_ids, all [batch, seq] or None, and
    groups, size and shift of shifted sparse attention's.
    """

    @property
    def supports_segments(self) -> bool:
        """Packed documents can be kept apart."""

    @property
    def supports_groups(self) -> bool:
        """Shifted sparse attention can be asked for."""

    @property
    def position_limit(self) -> int | None:
        """Rows of the table of positions; None where they are computed."""

    @property
    def name(self) -> str:
        """What the user loaded it by."""

    @property
    def params(self) -> Any:
        """The frozen tree."""

    @property
    def config(self) -> Any:
        """The model's configuration; it has ``model_type``."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as the model's files name them."""

    def init_params(self, rng: Array) -> Any:
        """Fresh random parameters; traced to learn the model's modules and shapes."""

    def with_params(self, params: Any) -> Any:
        """The model, as the user gave it, with other parameters."""

    # (*args: Any, **kwargs: Any) is how a protocol leaves the arguments to the two implementations.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """(input_ids, …) → the output for the model's own parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(variables, input_ids, …) → the output, with ``.logits`` [batch, seq, vocab]."""

    def hidden(self, *args: Any, **kwargs: Any) -> Array:
        """(variables, input_ids, …) → the states [batch, seq, d] that the output head reads."""

    def head(self, variables: Any) -> Array:
        """The output embedding [vocab, d]."""

    def generate(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """(prompts, …) → the new tokens of every prompt."""


def require_segments(base: BaseModel) -> None:
    """Raises a ConfigError for a model that would let the documents of a packed row see each other."""
    if not base.supports_segments:
        raise ConfigError(
            "packing needs a model that keeps packed documents apart",
            f"{base.name} knows no segment_ids",
            "Set packing=False, or load the model into our own decoder.",
        )


def vocab_size(base: BaseModel) -> int:
    """Rows of a base model's output embedding, from its shape alone."""
    return jax.eval_shape(base.head, {"params": base.params}).shape[0]


def as_base(model: Any) -> BaseModel:
    """The face of a base model.

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
