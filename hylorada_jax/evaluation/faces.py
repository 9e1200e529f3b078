"""One face of adapted models and bare ones, for evaluation."""

from __future__ import annotations

from typing import Any

from jax import Array

from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.base_model import vocab_size
from hylorada_jax.models.wrapped import as_base


def face_of(model: Any) -> AdaptedFace | BareFace:
    """What an evaluation asks of a model.

    Args:
        model: a :class:`HyLoRADAModel`, which within its ``disable_adapter()`` is its base; a
            :class:`CausalLM` or one of HF's Flax models.

    Raises:
        ModelError: it is none of these.
    """
    if not isinstance(model, HyLoRADAModel):
        return BareFace(as_base(model))
    return AdaptedFace(model) if model._enabled else BareFace(model.base)


class AdaptedFace:
    """What an evaluation asks of an adapted model."""

    def __init__(self, model: HyLoRADAModel) -> None:
        self._model, self.base, self.frozen = model, model.base, model.frozen
        self.resolve, self.head, self.vocab_size = model.resolve, model.head, model.vocab_size
        self.has_encoder = bool(model.config.use_hylorada_v2)

    def adapters(self) -> Any:
        """Those that the model has now."""
        return self._model.adapters

    def hidden(self, resolved: Any, frozen: Any, inputs: dict[str, Array]) -> Array:
        """The states [batch, seq, d] that the output head reads."""
        return self._model.hidden_resolved(resolved, **inputs, frozen=frozen)


class BareFace:
    """The same of a base model: nothing to adapt, nothing to resolve."""

    def __init__(self, base: Any) -> None:
        self.base, self.frozen, self.has_encoder = base, {"params": base.params}, False
        self.vocab_size = vocab_size(base)

    def adapters(self) -> Any:
        """An empty tree."""
        return {}

    def resolve(self, adapters: Any, frozen: Any) -> Any:
        """The same empty tree."""
        return adapters

    def hidden(self, resolved: Any, frozen: Any, inputs: dict[str, Array]) -> Array:
        """The states [batch, seq, d] that the output head reads."""
        return self.base.hidden(frozen, **inputs)

    def head(self, resolved: Any, frozen: Any) -> Array:
        """The output embedding [vocab, d]."""
        return self.base.head(frozen)
