"""What all adapted layers of a model read in one forward pass."""

import contextlib
import dataclasses
from collections.abc import Iterator

from torch import Tensor

from hylorada_jax.errors import ModelError


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """The facts of one forward pass that are computed once for the whole model.

    Args:
        positions: [batch, seq] position ids of the tokens; None where every stack counts its own from 0 (T5).
        key_positions: [batch, keys] those of all keys, which a cache makes more than the tokens.
        structure_prior: [batch, seq, structure_dim], or None without an encoder.
    """

    positions: Tensor | None
    key_positions: Tensor | None
    structure_prior: Tensor | None


class Passes:
    """Where the layers of one model find the forward pass that they are part of."""

    def __init__(self) -> None:
        self._current: ForwardPass | None = None

    @contextlib.contextmanager
    def running(self, current: ForwardPass) -> Iterator[None]:
        """Within it, ``current`` is the model's forward pass."""
        self._current = current
        try:
            yield
        finally:
            self._current = None

    @property
    def current(self) -> ForwardPass:
        """The pass that is running.

        Raises:
            ModelError: none is, because the base model was called without its HyLoRADAModel.
        """
        if self._current is None:
            raise ModelError(
                "Layers that read positions or a structure prior get them from HyLoRADAModel.",
                "a call of the base model, outside a forward pass of HyLoRADAModel",
                "Call the HyLoRADAModel itself.",
            )
        return self._current
