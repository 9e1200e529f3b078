"""Adapters by name, one of them active: what the banks of Linen and of NNX models have in common."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.config import TRAINING_ONLY, HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, near
from hylorada_jax.structure.code import Domain
from hylorada_jax.text import shown


class NamedAdapters:
    """The adapters of a model that has one of them.

    Attributes:
        by_name: the adapters, in the order in which they came.
        active: the name of the one that the model has.
        beside: the chat template and the structure of those that are not active, and perhaps of that one.

    Args:
        first: the adapter that the model has, named "default".
    """

    def __init__(self, first: Any) -> None:
        self.by_name: dict[str, Any] = {"default": first}
        self.active = "default"
        self.beside: dict[str, tuple[str | None, Domain | None]] = {}

    def index(self, adapters: Sequence[str | None]) -> Array:
        """The place of each row's adapter, int [batch]: 0 for None, then in their order.

        Raises:
            ConfigError: a name is not in the bank.
            DataError: there is one name, and not one for each row.
        """
        if isinstance(adapters, str):
            raise DataError(
                "The adapters of a batch are a name for each row.",
                repr(adapters),
                "Give a list of names, or switch to the adapter.",
            )
        for name in adapters:
            if name is not None:
                self.check_known(name)
        places = {name: place for place, name in enumerate((None, *self.by_name))}
        return jnp.asarray(np.array([places[name] for name in adapters], np.int32))

    def check_new(self, name: str) -> None:
        """A ConfigError for a name that is taken."""
        if name in self.by_name:
            raise ConfigError(
                "An adapter is not replaced unasked.", repr(name), "Choose another name, or remove it first."
            )

    def check_known(self, name: str) -> None:
        """A ConfigError for a name that no adapter has."""
        if name not in self.by_name:
            remedy = f"{near(name, self.by_name)} Others are added or loaded first."
            raise ConfigError("An adapter must be in the bank.", shown(name), remedy)


class Bank:
    """What a bank shows of its adapters and does with them, whatever the model."""

    _named: NamedAdapters

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they came."""
        return tuple(self._named.by_name)

    @property
    def active(self) -> str:
        """The name of the adapter that the model has."""
        return self._named.active

    def remove(self, name: str) -> None:
        """Drops an adapter; a ConfigError for one that is not there, or is active."""
        named = self._named
        named.check_known(name)
        if name == named.active:
            raise ConfigError("The active adapter stays.", repr(name), "Switch to another one first.")
        del named.by_name[name], named.beside[name]


def check_config(theirs: HyLoRADAConfig, ours: HyLoRADAConfig, remedy: str) -> None:
    """Compares the config of an adapter's files with the bank's, as far as a trained adapter computes by it.

    Args:
        theirs: the adapter's.
        ours: the model's.
        remedy: how the adapter gets a model of its own.

    Raises:
        CheckpointError: they differ; both sides are listed.
    """
    adapter, model = theirs.to_dict(), ours.to_dict()
    if differing := [
        f"{key}: adapter {shown(adapter[key])}, model {shown(value)}"
        for key, value in model.items()
        if adapter[key] != value and key not in TRAINING_ONLY
    ]:
        raise CheckpointError(
            "The adapters of a bank have the config of its model.", "; ".join(differing), remedy
        )
