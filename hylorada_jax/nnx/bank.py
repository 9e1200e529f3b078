"""Several adapters on one NNX model: by name, one at a time or one per row of a batch."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from hylorada_jax.errors import DataError, ModelError
from hylorada_jax.leaves import leaf_at
from hylorada_jax.nnx.adapted import Adapted
from hylorada_jax.nnx.adapting import Adaptation, adaptation_of, known_adaptation
from hylorada_jax.nnx.files import load_adapter
from hylorada_jax.nnx.resolving import resolve
from hylorada_jax.nnx.taking_off import unload
from hylorada_jax.nnx.tokens import given_to_rows, tokens
from hylorada_jax.nnx.variables import AdapterParam
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.structure.code import Domain
from hylorada_jax.surgery.layout import check_keys
from hylorada_jax.surgery.named import Bank, NamedAdapters, check_config
from hylorada_jax.trees import is_traced


class AdapterBank(Bank):
    """Several adapters of one config on one NNX model, by name.

        y_i = (x_i Wᵀ + s·(x_i Aₖᵀ) Bₖᵀ·p)·cₖ + bias          row i of a batch with its adapter k = k(i)

    The frozen products are taken once over the whole batch. The model has the active adapter: train it,
    or ``nnx.update`` it, and the bank has the new one.

    Args:
        model: one that :func:`adapt` was called with; its adapter is the bank's first, named "default".

    Raises:
        ModelError: it is not adapted, or embeddings or norms themselves train, of which a model has one.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig
        >>> from hylorada_jax.nnx import adapt
        >>> config = HyLoRADAConfig(method="lora", lora_rank=2, target_modules="all-linear")
        >>> bank = AdapterBank(adapt(nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), config, nnx.Rngs(1)))
        >>> bank.add("other", nnx.state(bank.model, AdapterParam))
        >>> bank(jnp.ones((3, 3)), adapters=["other", "default", None]).shape
        (3, 4)
        >>> bank.switch("other")
        >>> bank.names, bank.active
        (('default', 'other'), 'other')
    """

    def __init__(self, model: nnx.Module) -> None:
        unload(nnx.clone(model))  # refuses what cannot be
        self.model = model
        self._named = NamedAdapters(_state(model))
        self._read: list[Any] = []
        self._stacked: Any = None
        # By template and structure: nnx.jit compares them by identity.
        self._adaptations: dict[tuple[str | None, Domain | None], Adaptation] = {}
        called: Any = resolve(model)
        called.eval()
        self._graph = nnx.graphdef(called)

    def add(self, name: str, state: nnx.State) -> None:
        """Adds an adapter under a new name; the active one stays active.

        Args:
            name: a new name.
            state: ``nnx.state(…, AdapterParam)`` of a model with the same config; it is copied, since
                a step that donates its arrays would delete the bank's.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: the leaves have other names or shapes.
        """
        self._named.check_new(name)
        check_keys(*(_shapes(each) for each in (state, self._named.by_name[self._named.active])))
        self._named.by_name[name] = jax.device_put(state, may_alias=False)
        self._named.beside[name] = _beside(self.model)

    def load(self, name: str, directory: str | Path, *, base_config: Any = None) -> None:
        """Loads an adapter from its files; the active one stays active.

        Args:
            name: a new name.
            directory: of an adapter of the same base and config but for settings of training.
            base_config: as of :func:`load_adapter`.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: the adapter is damaged, was trained on another base, or has another config.
        """
        self._named.check_new(name)
        ours = adaptation_of(self.model)[0]
        saved = open_adapter(directory).on(ours.modules.linear_names)
        check_config(
            saved.config,
            ours.config,
            "Put it on a model of its own, which shares the frozen arrays: "
            "load_adapter(unload(nnx.clone(bank.model)), directory).",
        )
        self.add(name, _state(load_adapter(unload(nnx.clone(self.model)), saved, base_config=base_config)))
        self._named.beside[name] = saved.chat_template, saved.structure

    def switch(self, name: str) -> None:
        """Makes an adapter the model's; a ConfigError for one that is not there.

        Its chat template and structure become the model's too; functions that have compiled the model are
        compiled once more for each other two of these.
        """
        self._named.check_known(name)
        self._named.by_name[self._named.active] = _state(self.model)
        nnx.update(self.model, self._named.by_name[name])
        model: Any = self.model
        self._named.beside[self._named.active] = now = _beside(model)
        self._adaptations[now] = model.hylorada
        if (beside := self._named.beside[name]) not in self._adaptations:
            template, structure = beside
            other = dataclasses.replace(model.hylorada, chat_template=template, structure=structure)
            self._adaptations[beside] = other
        model.hylorada = self._adaptations[beside]
        self._named.active = name

    def __call__(self, *arguments: Any, adapters: Sequence[str | None] | None = None, **options: Any) -> Any:
        """The model's output, of a batch whose rows have an adapter each, in evaluation mode.

        Args:
            arguments: the model's; every array has an axis of rows in front.
            adapters: the adapter's name for each row; None for a row that has none. Absent: the active
                adapter for all rows, as in calling the model. Within :func:`disabled` no row has one. With
                names the call compiles itself: a function of yours that is compiled around it keeps the
                adapters that the bank had then.
            options: the model's keyword arguments, likewise.

        Raises:
            ConfigError: a name is not in the bank.
            DataError: there is not one name for each row, a list in the place of an array, or :func:`tokens`
                gives other rows.
            ModelError: the model writes to its variables, or gives something without an axis of rows.
        """
        if adapters is None:
            return self.model(*arguments, **options)
        index = self._named.index(adapters)
        if self._is_disabled():
            twin: Any = nnx.clone(self.model, variables=False)
            twin.eval()
            return twin(*arguments, **options)
        leaves, structure = jax.tree.flatten((arguments, options))
        if any(isinstance(leaf, list) for leaf in (*arguments, *options.values())):
            raise DataError(
                "What has a value for each row is an array.",
                "a list",
                "Give jax.numpy.asarray of it.",
            )
        arrays = [leaf if isinstance(leaf, jax.Array | np.ndarray) else None for leaf in leaves]
        fixed = tuple(leaf if array is None else None for leaf, array in zip(leaves, arrays, strict=True))
        if wrong := [
            array.shape for array in arrays if array is not None and array.shape[:1] != (len(adapters),)
        ]:
            raise DataError(
                "A batch has an adapter for each row, and every array an axis of rows in front.",
                f"{len(adapters)} adapters for {', '.join(map(str, wrong))}",
                "Give a name, or None, for each row.",
            )
        given = given_to_rows(len(adapters))
        return _rows(self._graph, fixed, structure, *self._resolved(), index, arrays, given)

    def _is_disabled(self) -> bool:
        """The model is within :func:`disabled`: adapted, but its modules have their plain classes."""
        modules = (module for _, module in nnx.iter_modules(self.model, graph=True))
        is_adapted = known_adaptation(self.model) is not None
        return is_adapted and not any(isinstance(each, Adapted) for each in modules)

    def _resolved(self) -> tuple[nnx.State, nnx.State]:
        """The resolved adapters with an axis in front, first none and then all; and what is not theirs."""
        self._named.by_name[self._named.active] = _state(self.model)
        # Kept until the model or an adapter changes.
        read = jax.tree.leaves((nnx.state(self.model), list(self._named.by_name.values())))
        if [*map(id, read)] == [*map(id, self._read)]:
            return self._stacked
        stacked = self._resolve()
        if not is_traced(stacked):
            self._read, self._stacked = read, stacked
        return stacked

    def _resolve(self) -> tuple[nnx.State, nnx.State]:
        twin = nnx.clone(self.model)
        resolved = []
        for state in self._named.by_name.values():
            nnx.update(twin, state)
            _, adapters, frozen = nnx.split(resolve(twin), AdapterParam, ...)
            resolved.append(_apart(adapters))  # what is not resolved is the twin's own
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), _none(resolved[0]), *resolved)
        return stack, frozen


def _kept(model: nnx.Module) -> dict[Any, Array]:
    """What a model has kept from call to call, in evaluation, by its place.

    Left out is what evaluation does not write to, for a scan writes back whatever it has scanned over.
    """
    others = nnx.Any(AdapterParam, nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Intermediate)
    return dict(jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Not(others))))


def _beside(model: Any) -> tuple[str | None, Domain | None]:
    return model.hylorada.chat_template, model.hylorada.structure


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rows(
    graph: Any,
    fixed: tuple[Any, ...],
    structure: Any,
    stack: Any,
    frozen: Any,
    index: Array,
    arrays: list[Any],
    given: dict[str, Array],
) -> Any:
    def one(adapter: Any, frozen: Any, row: list[Any], given: dict[str, Array]) -> Any:
        leaves = [kept if array is None else array[None] for kept, array in zip(fixed, row, strict=True)]
        arguments, options = jax.tree.unflatten(structure, leaves)
        model = nnx.merge(graph, adapter, frozen)
        before = _kept(model)
        with tokens(**given):
            output = model(*arguments, **options)
        after = _kept(model)
        if any(after.get(path) is not leaf for path, leaf in before.items()):
            raise ModelError(
                "A model with an adapter for each row keeps nothing from call to call.",
                "one that writes to its variables, as a cache of keys and values",
                "Merge each adapter into a model of its own.",
            )
        if any(jnp.shape(leaf)[:1] != (1,) for leaf in jax.tree.leaves(output)):
            raise ModelError(
                "A model with an adapter for each row gives arrays with an axis of rows in front.",
                f"shapes {jax.tree.map(jnp.shape, output)} for a row",
                "Call the model with one adapter, or let it give such arrays alone.",
            )
        return jax.tree.map(lambda leaf: leaf[0], output)

    adapters = jax.tree.map(lambda leaf: leaf[index], stack)
    return jax.vmap(one, (0, None, 0, 0))(adapters, frozen, arrays, given)


def _state(model: nnx.Module) -> nnx.State:
    """A model's adapter."""
    return _apart(nnx.state(model, AdapterParam))


def _apart(state: nnx.State) -> nnx.State:
    """The same arrays in variables of their own, which stay as they are when a model learns."""
    return jax.tree.map(jnp.asarray, state)


def _shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def _none(resolved: nnx.State) -> nnx.State:
    """The resolved adapter under which a model computes what its base does."""

    def idle(path: Any, leaf: Any) -> Any:
        row = leaf_at(tuple(map(str, path)), resolved=True)
        return leaf.replace(jnp.full_like(leaf[...], 0 if row is None else row.idle))

    return nnx.from_flat_state([(path, idle(path, leaf)) for path, leaf in nnx.to_flat_state(resolved)])
