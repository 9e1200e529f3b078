"""A frozen base model with trainable adapters: the object that users hold."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from hylorada_jax.config import READS_STRUCTURE, HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, ModelError
from hylorada_jax.math.quantized import dtype_name, dtype_of, size_of
from hylorada_jax.models.base_model import BaseModel, vocab_size
from hylorada_jax.models.causal_lm import CausalLM, DecodeStep
from hylorada_jax.models.generate import pad_left
from hylorada_jax.models.ids import check_batch, check_prompts, check_structure_ids, length_of
from hylorada_jax.models.placed import fitted, placed
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.weights_digest import tree_digest
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.placement.placement import Placement, placement_of
from hylorada_jax.placement.processes import is_first, whole
from hylorada_jax.placement.shards import in_use
from hylorada_jax.saved import adapter_files
from hylorada_jax.saved.opening import identity, open_on
from hylorada_jax.saved.saved_adapter import SavedAdapter
from hylorada_jax.seeds import check_seed
from hylorada_jax.shapes import check_rows
from hylorada_jax.structure.code import Domain
from hylorada_jax.surgery import build, layout
from hylorada_jax.surgery.fit import fit
from hylorada_jax.surgery.intercept import Structure, adapt
from hylorada_jax.surgery.merge import check_mergeable, merge
from hylorada_jax.surgery.modules import Modules
from hylorada_jax.surgery.plan import Site, count_parameters
from hylorada_jax.surgery.resolve import resolve
from hylorada_jax.surgery.split import join, split, unfrozen_paths
from hylorada_jax.trees import COLLECTION, Adapters, Frozen, Params, Resolved, by_name

_STRUCTURE_IDS = "structure_ids"


@dataclasses.dataclass(frozen=True)
class _AdaptedDecode:
    """A decoding step with adapters; hashed by value, so that models of one shape share a compilation."""

    step: DecodeStep
    config: HyLoRADAConfig
    dtype: Any

    def __call__(self, variables: Mapping[str, Any], *arguments: Any, **inputs: Any) -> Any:
        ids, valid = variables.get(_STRUCTURE_IDS), inputs.get("key_valid")
        if ids is not None and valid is not None:
            ids = _aligned(ids, valid)
        structure = Structure(ids=ids, decoding=True)
        collections = {name: tree for name, tree in variables.items() if name != _STRUCTURE_IDS}
        with adapt(variables[COLLECTION], self.config, dtype=self.dtype, structure=structure):
            return self.step(collections, *arguments, **inputs)


def _aligned(ids: Int[Array, "batch prompt"], valid: Bool[Array, "batch width"]) -> Int[Array, "batch width"]:
    """The prompts' structure, in rows that may have new tokens too; -1 is before a prompt, as padding is."""
    width, new = ids.shape[1], valid[0].sum() - (ids[0] >= 0).sum()
    places = jnp.arange(valid.shape[1]) - valid.shape[1] + width + new
    return jnp.maximum(ids[:, jnp.clip(places, 0, width - 1)], 0)


def checked(base: BaseModel, input_ids: Array, inputs: Mapping[str, Array | None]) -> Array:
    """The tokens of a call that compiles itself, under which nobody sees the values: they are read here.

    Args:
        base: the model that is called.
        input_ids: int [batch, seq].
        inputs: its others, of which position_ids and structure_ids are read.

    Raises:
        DataError: input_ids are not [batch, seq], an id is outside the vocabulary, a position outside the
            model's table, or structure ids are not integers ≥ 0.
    """
    check_batch(input_ids, base.token_limit)
    check_structure_ids(inputs.get(_STRUCTURE_IDS))
    input_ids = jnp.asarray(input_ids)
    check_range(input_ids.shape, inputs.get("position_ids"), base.position_limit)
    return input_ids


class HyLoRADAModel:
    """A language model whose weights stay frozen, with adapters that train.

        y = (x Wᵀ + s·(x Aᵀ) Bᵀ·p)·c + bias   in every adapted linear layer
        S' = α·S + β + position_bias[bucket(q − k)]   on the logits of every self-attention (DAA)
        h + up(gelu(down(h) ⊙ mask))   after every MLP block (sparse adapter)

    c, a factor of each output feature, and p, of each token, are those of the method's linear layer, as
    :class:`~hylorada_jax.modules.linear.HyLoRADAUnified`.

    Attributes:
        base: the base model, ours or HF's.
        config: what is adapted.
        modules: the modules of the base that can be adapted.
        sites: those that are, and with what.
        adapters: the trainable tree, paths as in ``base.params``. Assign to it to change the adapters; a
            tree of other leaves or shapes is a ModelError.
        frozen: what does not train: {"params": the base's parameters, but for those that train themselves,
            "constants": what :func:`build_constants` gives, such as ‖W‖² of adapted layers}.
        placement: the mesh over which all of this is sharded; None: one device.
        chat_template: with which it is trained on conversations, where that is not the base's own; saved with
            the adapters.
        structure: what they are trained to read of texts, "code" or None; saved with them, for commands.
        disabled: calling the model, or generating with it, uses the base alone; see :meth:`disable_adapter`.

    Args:
        base_model: a :class:`CausalLM` from :func:`load_model`, or one of HF's Flax models.
        config: the adapter's settings.
        seed: of the initial lora_A, in [0, 2³²).
        placement: where the model is put; None: where it is, as :func:`load_model` has put it.

    Raises:
        TargetError: a target matches no layer.
        ModelError: the base model is not one that can be adapted, is known to compute wrongly, or has
            nothing that a component could attach to.
        ConfigError: the seed is out of range; shifted sparse attention is on, and a layer has a single head;
            or the placement would cut a head.

    Example:
        >>> from hylorada_jax import HyLoRADAConfig, HyLoRADAModel
        >>> from hylorada_jax.models.causal_lm import CausalLM
        >>> from hylorada_jax.models.decoder_config import DecoderConfig
        >>> shape = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2,
        ...          "num_attention_heads": 2, "intermediate_size": 32}
        >>> base = CausalLM.from_config(DecoderConfig.from_hf(shape), jax.random.key(0))
        >>> model = HyLoRADAModel(base, HyLoRADAConfig(lora_rank=2))
        >>> model(jax.numpy.ones((1, 3), int)).logits.shape
        (1, 3, 32)

    Source: method.md §§1, 3, 4 and 8.
    """

    _seed: int | None  # of fresh adapters; None of any others

    def __init__(
        self,
        base_model: Any,
        config: HyLoRADAConfig,
        seed: int = 0,
        *,
        placement: Placement | None = None,
    ) -> None:
        check_seed(seed)
        base = as_base(base_model)
        self._set_up(base, config, *fit(base, config), placement)
        self.adapters = self.init_adapters(seed)
        self._seed = seed

    def _set_up(
        self,
        base: BaseModel,
        config: HyLoRADAConfig,
        modules: Modules,
        sites: tuple[Site, ...],
        placement: Placement | None,
    ) -> None:
        """All that there is beside the adapters."""
        base = base if placement is None else placed(base, placement)
        placement = placement or placement_of(base.params)
        self.placement = placement and fitted(placement, base)
        self.base, self.config, self.modules, self.sites = base, config, modules, sites
        constants = self._put(build.build_constants(sites, base.params, config))
        self._unfrozen = unfrozen_paths(sites)
        self.frozen: Frozen = {"params": split(base.params, self._unfrozen)[0], "constants": constants}
        self.disabled = False
        self.chat_template: str | None = None
        self.structure: Domain | None = None
        self._compile()

    @property
    def adapters(self) -> Adapters:
        """The trainable tree."""
        return self._adapters

    @adapters.setter
    def adapters(self, tree: Adapters) -> None:
        own = getattr(self, "_adapters", tree)  # the first are the model's own
        given, wanted = ({name: jnp.shape(x) for name, x in by_name(each).items()} for each in (tree, own))
        if differing := sorted(dict(given.items() ^ wanted.items())):
            first = differing[0]
            raise ModelError(
                "Adapters must have the leaves and shapes that the model was adapted with.",
                f"{first}: {given.get(first, 'absent')} for {wanted.get(first, 'none')}, "
                f"one of {len(differing)} that differ",
                "Give adapters of this model and config, as model.init_adapters(seed) makes them.",
            )
        self._adapters, self._seed = tree, None

    @property
    def start(self) -> str:
        """Where training starts: the seed of fresh adapters, or a checksum of any others.

        Not always a checksum: the last bits of fresh ones are the platform's. Of several processes all must
        ask.
        """
        if self._seed is not None:
            return f"seed {self._seed}"
        return adapter_files.digest(layout.flatten(self.sites, self.adapters))

    def _compile(self) -> None:
        self._jitted, self._resolve = jax.jit(self.apply), jax.jit(self.resolve)

    def __getstate__(self) -> dict[str, Any]:
        """All but compiled programs, which belong to this model alone and cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name not in ("_jitted", "_resolve")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

    def init_adapters(self, seed: int) -> Adapters:
        """A tree of fresh adapters, under which the model computes what its base does.

        Args:
            seed: of the initial lora_A; the constructor's gave ``model.adapters``.

        Raises:
            ConfigError: the seed is no integer in [0, 2³²).
        """
        check_seed(seed)
        constants = self.frozen["constants"]
        if self.placement is not None:
            # Drawn on one device: to divide the draw would cost more than it saves.
            constants = jax.tree.map(whole, constants)
        return self._put(build.build_adapters(self.sites, constants, self.base.params, self.config, seed))

    def _put(self, tree: dict[str, Any]) -> dict[str, Any]:
        return tree if self.placement is None else self.placement.put(tree)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        structure_ids: Array | None = None,
        structure_positions: Array | None = None,
    ) -> Any:
        """The model's output in evaluation mode, as HF's models give it: ``.logits`` [batch, seq, vocab].

        Args:
            input_ids: int [batch, seq].
            attention_mask: 1 for tokens, 0 for padding, on either side [batch, seq].
            position_ids: int [batch, seq]; counted from the mask or the segments when absent.
            segment_ids: packed documents 1, 2, …, padding 0 [batch, seq].
            structure_ids: what the structure encoder of hylorada_v2 reads of each token, int [batch, seq].
            structure_positions: each token's place for that encoder, such as hours [batch, seq];
                ``position_ids`` when absent.

        Raises:
            DataError: a token id is outside the vocabulary, a position outside the model's table, or
                structure ids do not fit the tokens.
            ConfigError: nothing in the model reads structure.
        """
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "segment_ids": segment_ids}
        if self.disabled:
            return self.base(input_ids, **inputs)
        inputs |= {"structure_ids": structure_ids, "structure_positions": structure_positions}
        input_ids = checked(self.base, input_ids, inputs)
        with in_use(self.frozen):
            return self._jitted(self.adapters, input_ids, frozen=self.frozen, **inputs)

    def apply(
        self,
        adapters: Adapters,
        input_ids: Array,
        *,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        frozen: Frozen | None = None,
        **inputs: Any,
    ) -> Any:
        """The model's output as a pure function of the adapters, to jit and differentiate.

        Args:
            adapters: a tree like ``model.adapters``.
            input_ids: int [batch, seq].
            train: apply dropout and shifted sparse attention, where the config has them.
            rngs: {"dropout": key}, needed when ``train`` and a dropout rate is above 0.
            frozen: ``model.frozen``; pass it through your jit's arguments to keep the weights out of the
                compiled program.
            inputs: attention_mask, position_ids, segment_ids, structure_ids, structure_positions, as in
                calling the model.

        Returns:
            The base model's output, with ``.logits``.

        Raises:
            DataError: as in calling the model, for ids whose values are known. Under ``jax.jit`` or the like
                a token id outside the vocabulary goes unnoticed, and the output means nothing.
        """
        resolved = self.resolve(adapters, frozen)
        return self.apply_resolved(resolved, input_ids, train=train, rngs=rngs, frozen=frozen, **inputs)

    def resolve(self, adapters: Adapters, frozen: Frozen | None = None) -> Resolved:
        """The adapters' weight-only quantities (A, s·B, c, …), to be computed once per step.

        Args:
            adapters: a tree like ``model.adapters``.
            frozen: ``model.frozen``.
        """
        frozen = self.frozen if frozen is None else frozen
        return resolve(self.sites, adapters, frozen["params"], frozen["constants"], self.config)

    def apply_resolved(self, resolved: Resolved, input_ids: Array, **arguments: Any) -> Any:
        """As :meth:`apply`, from the result of :meth:`resolve`."""
        return self._run(self.base.forward, resolved, input_ids, **arguments)

    def hidden(self, resolved: Resolved, input_ids: Array, **arguments: Any) -> Array:
        """The states [batch, seq, d] that the output head reads, from the result of :meth:`resolve`."""
        return self._run(self.base.hidden, resolved, input_ids, **arguments)

    def head(self, resolved: Resolved | None = None, frozen: Frozen | None = None) -> Array:
        """The output embedding [vocab, d].

        Args:
            resolved: from :meth:`resolve`; its own embedding, where the embeddings train and are tied: in at
                least float32, from which :func:`hylorada_jax.math.loss.logits` rounds.
            frozen: ``model.frozen``.
        """
        return self.base.head({"params": self._params(resolved, frozen)})

    @property
    def vocab_size(self) -> int:
        """Rows of the output embedding."""
        return vocab_size(self.base)

    @property
    def has_encoder(self) -> bool:
        """A structure encoder reads structure ids and positions."""
        return bool(self.config.use_hylorada_v2)

    def _params(self, resolved: Resolved | None, frozen: Frozen | None) -> Params:
        """The base's whole parameter tree, with the leaves that train where there are any."""
        frozen = self.frozen if frozen is None else frozen
        if not self._unfrozen:
            return frozen["params"]
        trained = self.base.params if resolved is None else resolved
        return join(frozen["params"], split(trained, self._unfrozen)[1])

    def _dtype(self, frozen: Frozen | None) -> Any:
        """What the base computes in; what trains is wider."""
        return dtype_of((self.frozen if frozen is None else frozen)["params"])

    def _run(
        self,
        function: Any,
        resolved: Resolved,
        input_ids: Array,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        frozen: Frozen | None = None,
        structure_ids: Array | None = None,
        structure_positions: Array | None = None,
        rows: Array | None = None,
        **inputs: Any,
    ) -> Any:
        check_batch(input_ids, self.base.token_limit)
        input_ids = jnp.asarray(input_ids)
        structure = Structure(ids=structure_ids, positions=structure_positions)
        self._check_structure(structure, input_ids.shape)
        if train and self.config.s2_attn_enabled:
            inputs["groups"] = self.config.s2_groups(input_ids.shape[1])
        variables = {"params": self._params(resolved, frozen), COLLECTION: resolved}
        facts = {"dtype": self._dtype(frozen), "structure": structure, "rows": rows}
        with adapt(resolved, self.config, train=train, **facts):
            return function(variables, input_ids, rngs=rngs, **inputs)

    def _check_structure(self, structure: Structure, shape: tuple[int, ...]) -> None:
        for name, given in (("structure_ids", structure.ids), ("structure_positions", structure.positions)):
            if given is None:
                continue
            self._check_encoder(name)
            if name == _STRUCTURE_IDS:
                check_structure_ids(given)
            check_rows(shape, **{name: given})

    def _check_encoder(self, name: str) -> None:
        if not self.has_encoder:
            raise ConfigError(
                READS_STRUCTURE,
                f"{name} for method={self.config.method!r}",
                f"Choose method='hylorada_v2', or leave {name} out.",
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        structure_ids: Sequence[Sequence[int]] | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """Continues prompts with a KV cache; the adapters are resolved once for the whole generation.

        Args:
            prompts: token ids, one list per prompt, of any lengths.
            structure_ids: a list like each prompt, for hylorada_v2; new tokens take its last value.
            settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id, rng,
                as in :func:`hylorada_jax.models.generate.generate`; without eos_token_id the model's own end
                tokens count, and with () none.

        Returns:
            The new tokens of every prompt.

        Raises:
            ConfigError: a setting is out of range, or nothing in the model reads structure.
            DataError: there is no prompt, one is empty or has a token id outside the vocabulary, or
                structure ids do not fit the prompts.
            NonFiniteError: a logit is NaN or infinite.
        """
        with self._decoding(prompts, structure_ids) as adapted:
            return self.base.generate(prompts, **adapted, **settings)

    def stream(
        self, prompt: Sequence[int], *, structure_ids: Sequence[int] | None = None, **settings: Any
    ) -> Iterator[list[int]]:
        """The tokens that :meth:`generate` gives for one prompt, as they come, some at a time.

        Args:
            prompt: token ids.
            structure_ids: one for each of them, for hylorada_v2.
            settings: as for :meth:`generate`, with the same errors.

        Returns:
            An iterator of lists of new tokens; Hugging Face's models give them all at once.

        Example:
            for tokens in model.stream(tokenizer.encode_prompt("Once").ids, max_new_tokens=20):
                print(tokens)
        """
        with self._decoding([prompt], None if structure_ids is None else [structure_ids]) as adapted:
            return self.base.stream(prompt, **adapted, **settings)

    def _resolved(self) -> Resolved:
        """What :meth:`resolve` gives of the model's own adapters."""
        with in_use(self.frozen):
            return self._resolve(self.adapters, self.frozen)

    @contextlib.contextmanager
    def _decoding(
        self, prompts: Sequence[Sequence[int]], structure_ids: Sequence[Sequence[int]] | None
    ) -> Iterator[dict[str, Any]]:
        """What the base is to be given to decode with the adapters."""
        check_prompts(prompts, self.base.token_limit)
        if self.disabled:
            yield {}
            return
        resolved = self._resolved()
        variables: dict[str, Any] = {"params": self._params(resolved, None), COLLECTION: resolved}
        if structure_ids is not None:
            self._check_encoder(_STRUCTURE_IDS)
            lengths = [length_of(ids) for ids in structure_ids]
            if lengths != [len(prompt) for prompt in prompts]:
                raise DataError(
                    "structure_ids must have one value per token of each prompt.",
                    f"lengths {lengths} for {[len(p) for p in prompts]}",
                    "Give a list like each prompt.",
                )
            for ids in structure_ids:
                check_structure_ids(ids)
        if isinstance(self.base, CausalLM):
            decode = _AdaptedDecode(DecodeStep(self.base.module), self.config, self._dtype(None))
            if structure_ids is not None:
                variables[_STRUCTURE_IDS] = jnp.asarray(pad_left(structure_ids, filling=-1))
            yield {"variables": variables, "decode": decode}
            return
        padded = None if structure_ids is None else jnp.asarray(pad_left(structure_ids, bucket=False))
        structure = Structure(ids=padded, decoding=True)
        with adapt(resolved, self.config, dtype=self._dtype(None), structure=structure):
            yield {"variables": variables}

    @property
    def num_trainable(self) -> int:
        """The number of trainable parameters."""
        return count_parameters(self.sites)

    def print_trainable_parameters(self) -> None:
        """Prints the trainable and the total number of parameters."""
        total = self.num_trainable + size_of(self.frozen["params"])
        share = 100 * self.num_trainable / total
        print(f"trainable params: {self.num_trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which calling the model, or generating with it, gives exactly the base model."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    def merge_and_unload(self) -> Any:
        """The base model with the adapters folded into a copy of the adapted weights.

            W' = c ⊙ (W + s·B A)

        Returns:
            A model of the kind that was given; the frozen base itself is unchanged.

        Raises:
            ModelError: a component has an effect that no weights can express; it is named.
        """
        check_mergeable(self.sites, self.adapters)
        resolved = self._resolved()
        params = merge(self.sites, resolved, self.base.params, self.config)
        return self.base.with_params(params)

    @property
    def linear_names(self) -> list[str]:
        """The full names of all linear layers that can be adapted."""
        return self.modules.linear_names

    def with_remat(self, remat: str) -> Self:
        """This model, with the same arrays and another rematerialisation, which only our decoder has.

        Args:
            remat: "none", "dots" or "full" (:class:`hylorada_jax.models.decoder.DecoderLM`).
        """
        model = copy.copy(self)
        if isinstance(self.base, CausalLM):
            model.base = dataclasses.replace(self.base, module=self.base.module.clone(remat=remat))
        return model

    def identity(self, *, weights: bool = False) -> dict[str, Any]:
        """What identifies the base model (:func:`base_identity`), and its weights' dtype.

        Args:
            weights: with their :func:`tree_digest`, which takes about a second for 2 GB.
        """
        found = identity(self.base, self.modules) | {"dtype": dtype_name(self.base.params)}
        return found | ({"weights_sha256": self._digest} if weights else {})

    @functools.cached_property
    def _digest(self) -> str:
        return tree_digest(self.base.params)

    def save_pretrained(
        self, directory: str | Path, *, overwrite: bool = False, weights: bool = False
    ) -> None:
        """Writes the adapter: adapter_config.json and adapter_model.safetensors.

        Of several processes all must call it, and the first writes.

        Args:
            directory: made if it does not exist.
            overwrite: replace an adapter that is already there.
            weights: record a digest of the base's weights, for ``check_weights``.

        Raises:
            CheckpointError: an adapter is already there, or cannot be written.
        """
        tensors = layout.flatten(self.sites, self.adapters)
        identity = self.identity(weights=weights)
        if not is_first():
            return
        adapter_files.write_adapter(
            directory,
            tensors,
            self.config,
            identity,
            overwrite=overwrite,
            chat_template=self.chat_template,
            structure=self.structure,
        )

    @classmethod
    def from_pretrained(
        cls,
        base_model: Any,
        directory: str | Path | SavedAdapter,
        *,
        check_weights: bool = False,
        placement: Placement | None = None,
    ) -> "HyLoRADAModel":
        """The model with a saved adapter on it.

        Args:
            base_model: the base model the adapter was trained on.
            directory: what :meth:`save_pretrained` wrote, or what :func:`open_adapter` gave of it.
            check_weights: refuse a base model whose weights are others than those it was trained on, bit by
                bit and in their dtype; the adapter must have recorded them, as that of a run has.
            placement: as of the constructor.

        Raises:
            ModelError: the base is no model that can be adapted.
            CheckpointError: the adapter is damaged, or does not fit the base model.
            ConfigError: a setting of the adapter's is refused, or the placement would cut a head.
        """
        base = as_base(base_model)
        opened = open_on(base, directory)
        saved = opened.saved
        model = cls.__new__(cls)  # without fresh adapters, which the constructor makes
        model._set_up(base, saved.config, opened.modules, opened.sites, placement)
        if check_weights:
            adapter_files.check_weights(saved.base, model.identity(weights=True))
        model.adapters = model._put(layout.unflatten(model.sites, saved.tensors()))
        model.chat_template, model.structure = saved.chat_template, saved.structure
        return model
