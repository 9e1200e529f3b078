"""What training and evaluation ask of a model, whether all of it trains, an adapter, or nothing."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jax import Array

from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.trees import Adapters, Frozen, Resolved


@runtime_checkable
class Scorable(Protocol):
    """A model whose tokens can be scored: pure functions of what trains and of what is frozen.

        R = resolve(adapters, frozen);   logits = hidden(R, tokens, frozen) · head(R, frozen)ᵀ

    ``resolve`` depends on weights alone: a step calls it once, however many batches follow.
    """

    @property
    def base(self) -> BaseModel:
        """The base model, which knows the limits on its inputs."""

    @property
    def frozen(self) -> Frozen:
        """What does not train; an argument, so that no weight is a constant of a compiled program."""

    @property
    def adapters(self) -> Adapters:
        """What trains, with its present values; empty where nothing trains."""

    @property
    def num_trainable(self) -> int:
        """The number of trainable parameters."""

    @property
    def has_encoder(self) -> bool:
        """A structure encoder reads structure ids and positions."""

    @property
    def disabled(self) -> bool:
        """The adapters are switched off, and the base model is to be scored alone."""

    def resolve(self, adapters: Adapters, frozen: Frozen) -> Resolved:
        """What the adapters amount to that depends on weights alone."""

    def hidden(
        self,
        resolved: Resolved,
        input_ids: Array,
        *,
        frozen: Frozen,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        rows: Array | None = None,
        **inputs: Any,
    ) -> Array:
        """The states [batch, seq, d] that the output head reads.

        Args:
            resolved: of :meth:`resolve`.
            input_ids: tokens.
            frozen: what does not train.
            train: apply dropout.
            rngs: {"dropout": key}.
            rows: the number of every row among those of its step, on which its dropout depends.
            inputs: as in calling the model.
        """

    def head(self, resolved: Resolved, frozen: Frozen) -> Array:
        """The output embedding [vocab, d]."""


class BareModel:
    """A base model, nothing of which trains."""

    num_trainable, has_encoder, disabled = 0, False, False

    def __init__(self, base: BaseModel) -> None:
        self.base, self.frozen = base, {"params": base.params}
        self.adapters: Adapters = {}

    def resolve(self, adapters: Adapters, frozen: Frozen) -> Resolved:
        """The empty tree."""
        return adapters

    def hidden(
        self,
        resolved: Resolved,
        input_ids: Array,
        *,
        frozen: Frozen,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        rows: Array | None = None,
        **inputs: Any,
    ) -> Array:
        """The states [batch, seq, d] that the output head reads."""
        return self.base.hidden(frozen, input_ids, **inputs)

    def head(self, resolved: Resolved, frozen: Frozen) -> Array:
        """The output embedding [vocab, d]."""
        return self.base.head(frozen)


def as_scorable(model: Any) -> Scorable:
    """A model as training and evaluation take it.

    Args:
        model: a :class:`HyLoRADAModel`, which within its ``disable_adapter()`` is its base; another
            :class:`Scorable`; a :class:`CausalLM`, or one of HF's Flax models.

    Raises:
        ModelError: it is none of these.
    """
    if not isinstance(model, Scorable):
        return BareModel(as_base(model))
    return BareModel(model.base) if model.disabled else model
