"""Several adapters on one frozen base: by name, one at a time or one per row of a batch."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hylorada_jax.errors import DataError
from hylorada_jax.leaves import leaf_at
from hylorada_jax.model import HyLoRADAModel, checked
from hylorada_jax.models.ids import check_batch
from hylorada_jax.placement.shards import in_use
from hylorada_jax.saved.opening import open_on
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.modules import subtree
from hylorada_jax.surgery.named import Bank, NamedAdapters, check_config
from hylorada_jax.surgery.split import unfrozen_paths
from hylorada_jax.trees import Adapters, Frozen, Resolved, by_name, is_traced


class AdapterBank(Bank):
    """Several adapters of one config on one frozen base model, by name.

        y_i = (x_i Wᵀ + s·(x_i Aₖᵀ) Bₖᵀ·p)·cₖ + bias          row i of a batch with its adapter k = k(i)

    p and c are those of :class:`HyLoRADAModel`. The frozen products are taken once over the whole batch.
    ``model.adapters`` is the active adapter: assign to it, or train it, and the bank has the new one. A model
    has one bank. For adapters of another config make another :class:`HyLoRADAModel` on the same base: the
    frozen weights are shared, not copied.

    Attributes:
        model: the model; its adapters are the bank's first, named "default".

    Args:
        model: the adapted model, whose config all adapters share.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig
        >>> from hylorada_jax.models.causal_lm import CausalLM
        >>> from hylorada_jax.models.decoder_config import DecoderConfig
        >>> shape = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2,
        ...          "num_attention_heads": 2, "intermediate_size": 32}
        >>> base = CausalLM.from_config(DecoderConfig.from_hf(shape), jax.random.key(0))
        >>> config = HyLoRADAConfig(method="lora", lora_rank=2)
        >>> bank = AdapterBank(HyLoRADAModel(base, config))
        >>> bank.add("other", HyLoRADAModel(base, config, seed=1).adapters)
        >>> bank(jnp.ones((3, 4), int), ["other", "default", None]).logits.shape
        (3, 4, 32)
        >>> bank.switch("other")
        >>> bank.names, bank.active
        (('default', 'other'), 'other')

    Source: Chen et al. 2023 (Punica), §3: several adapters in one batch.
    """

    def __init__(self, model: HyLoRADAModel) -> None:
        self.model = model
        self._named = NamedAdapters(model.adapters)
        self._like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.adapters)
        self._stacked: tuple[list[Adapters], Resolved] = [], {}
        self._rows = jax.jit(functools.partial(apply_rows, model))
        self._resolve = jax.jit(model.resolve)

    def add(self, name: str, adapters: Adapters) -> None:
        """Adds an adapter under a new name; the active one stays active.

        Args:
            name: how it is called from now on.
            adapters: a tree like ``model.adapters``; it is copied, since a step that donates its arrays would
                delete the bank's.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: the tree has other leaves or shapes; both sides are listed.
        """
        self._named.check_new(name)
        self._named.by_name[name] = jax.device_put(self._fitted(adapters), may_alias=False)
        self._named.beside[name] = self.model.chat_template, self.model.structure

    def load(self, name: str, directory: str | Path) -> None:
        """Loads an adapter from its files; the active one stays active.

        Args:
            name: a new name.
            directory: what ``save_pretrained`` wrote, of the same base and config but for settings of
                training, such as dropout and starts; for more training those of the model count.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: the adapter is damaged, was trained on another base, or has another config.
        """
        self._named.check_new(name)
        saved = open_on(self.model.base, directory, self.model.modules).saved
        check_config(
            saved.config,
            self.model.config,
            "Give it a model of its own, which shares the frozen weights: "
            "HyLoRADAModel.from_pretrained(bank.model.base, directory).",
        )
        self._named.by_name[name] = self._fitted(layout.unflatten(self.model.sites, saved.tensors()))
        self._named.beside[name] = saved.chat_template, saved.structure

    def switch(self, name: str) -> None:
        """Makes an adapter the model's, without compiling anew; a ConfigError for one that is not there.

        Its chat template and structure become the model's too, as they were in its files, or the model's own
        when it was added.
        """
        self._named.check_known(name)
        self._keep_active()
        model = self.model
        self._named.beside[self._named.active] = model.chat_template, model.structure
        model.chat_template, model.structure = self._named.beside[name]
        model.adapters, self._named.active = self._named.by_name[name], name

    def __call__(
        self, input_ids: Array, adapters: Sequence[str | None] | None = None, **inputs: Array | None
    ) -> Any:
        """The output in evaluation mode of a batch whose rows have an adapter each.

        Other names in another order run the same program; another number of adapters compiles a new one. A
        function that you compile around the call keeps the adapters that the bank had when it was compiled:
        :func:`apply_rows` takes them as arguments.

        Args:
            input_ids: int [batch, seq].
            adapters: the adapter's name for each row; None for a row that has none, which gives the base
                model's numbers to rounding (``model.disable_adapter()`` gives its bits, for all rows).
                Absent: the active adapter for all rows, as in calling the model. With names each row is
                rotated as if it were called alone, which differs with LongRoPE and dynamic NTK.
            inputs: attention_mask, position_ids, segment_ids, structure_ids, structure_positions
                [batch, seq], as in calling the model.

        Raises:
            ConfigError: a name is not in the bank.
            DataError: there is not one name, or one row of an input, for each row of ``input_ids``; or as in
                calling the model.
        """
        index = None if adapters is None else self.index(adapters)
        if index is None or self.model.disabled:
            return self.model(input_ids, **inputs)
        input_ids = checked(self.model.base, input_ids, inputs)
        # Without the mesh in use, by which each row, a batch of one, would be computed on all of its devices.
        return self._rows(self.stack(), index, input_ids, frozen=self.model.frozen, **inputs)

    def index(self, adapters: Sequence[str | None]) -> Array:
        """The place of each row's adapter in :meth:`stack`, int [batch]; errors as in calling the bank."""
        return self._named.index(adapters)

    def stack(self) -> Resolved:
        """The resolved adapters for :func:`apply_rows`: first none, then all in the order of ``names``."""
        self._keep_active()
        trees = list(self._named.by_name.values())
        # Kept until an adapter comes, goes or is trained.
        if [*map(id, trees)] == [*map(id, self._stacked[0])]:
            return self._stacked[1]
        with in_use(self.model.frozen):
            resolved = [self._resolve(tree, self.model.frozen) for tree in trees]
        rows = no_adapter(self.model, resolved[0]), *resolved
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        if not is_traced(stack):
            self._stacked = trees, stack
        return stack

    def _keep_active(self) -> None:
        """What the user assigned to ``model.adapters`` is the active adapter."""
        given, named = self.model.adapters, self._named
        if given is named.by_name[named.active]:
            return
        # Values also within a trace, as of a function compiled around the call: the bank outlives it.
        with contextlib.nullcontext() if is_traced(given) else jax.ensure_compile_time_eval():
            self.model.adapters = named.by_name[named.active] = self._fitted(given)

    def _fitted(self, adapters: Adapters) -> Adapters:
        """The adapters in the structure and dtypes that the compiled programs know, where they belong."""
        given, wanted = by_name(adapters), by_name(self._like)
        shapes = ({name: np.shape(leaf) for name, leaf in leaves.items()} for leaves in (given, wanted))
        layout.check_keys(*shapes)
        leaves = [jnp.asarray(given[name], leaf.dtype) for name, leaf in wanted.items()]
        tree = jax.tree.unflatten(jax.tree.structure(self._like), leaves)
        return tree if (placement := self.model.placement) is None else placement.put(tree)


def apply_rows(
    model: HyLoRADAModel,
    stack: Resolved,
    index: Array,
    input_ids: Array,
    *,
    frozen: Frozen | None = None,
    **inputs: Array | None,
) -> Any:
    """The output of a batch whose rows have an adapter each, as a pure function to jit and differentiate.

    In evaluation mode. Each row is computed as a batch of its own, but for the frozen weights, whose products
    are taken over all rows at once. What trains in place of the base's own (embeddings, norms) is gathered
    for each row like an adapter.

    Args:
        model: whose config the adapters have.
        stack: resolved adapters with an axis [n] in front, from :meth:`AdapterBank.stack`.
        index: the place in it of each row's adapter, int [batch]; beyond its end the row is NaN.
        input_ids: int [batch, seq].
        frozen: ``model.frozen``; pass it through your jit's arguments to keep the weights out of the
            compiled program.
        inputs: attention_mask, position_ids, segment_ids, structure_ids, structure_positions [batch, seq].

    Returns:
        The base model's output, with ``.logits`` [batch, seq, vocab].

    Raises:
        DataError: ``index`` or an input has not one entry for each row, or a token id whose value is known
            is outside the vocabulary; or input_ids are not [batch, seq].
    """
    check_batch(input_ids, model.base.token_limit)
    given = {name: jnp.asarray(value) for name, value in inputs.items() if value is not None}
    counts = {name: jnp.shape(value)[:1] for name, value in {"adapters": index, **given}.items()}
    if any(count != jnp.shape(input_ids)[:1] for count in counts.values()):
        raise DataError(
            "A batch has an adapter, and a row of each input, for each row of input_ids.",
            f"{counts} for input_ids {jnp.shape(input_ids)}",
            "Give one for each row.",
        )

    def one(resolved: Resolved, row: Array, given: Mapping[str, Array]) -> Any:
        alone = {name: value[None] for name, value in given.items()}
        output = model.apply_resolved(resolved, row[None], frozen=frozen, **alone)
        return jax.tree.map(lambda leaf: leaf[0], output)

    gathered = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0, mode="fill"), stack)
    return jax.vmap(one)(gathered, jnp.asarray(input_ids), given)


def no_adapter(model: HyLoRADAModel, resolved: Resolved) -> Resolved:
    """The resolved tree under which a model computes what its base does: c and α are 1, and all else 0.

    Args:
        model: its base has the values of the leaves that train themselves.
        resolved: of any adapter; its structure, shapes and dtypes are read.
    """
    unfrozen = set(unfrozen_paths(model.sites))

    def neutral(path: Any, leaf: Array) -> Array:
        keys = tuple(entry.key for entry in path)
        if keys in unfrozen:
            return subtree(model.base.params, keys).astype(leaf.dtype)
        row = leaf_at(keys, resolved=True)
        return jnp.full_like(leaf, 0 if row is None else row.idle)

    return jax.tree_util.tree_map_with_path(neutral, resolved)
