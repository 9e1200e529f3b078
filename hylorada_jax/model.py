"""A frozen base model with trainable adapters: the object that users hold."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.io import adapter_files
from hylorada_jax.models.causal_lm import CausalLM, DecodeStep
from hylorada_jax.models.face import as_base
from hylorada_jax.models.generate import generate
from hylorada_jax.surgery import build, layout
from hylorada_jax.surgery.intercept import COLLECTION, adapt_linears
from hylorada_jax.surgery.linears import Tree, find_linears
from hylorada_jax.surgery.merge import merge
from hylorada_jax.surgery.resolve import resolve


@dataclasses.dataclass(frozen=True)
class _AdaptedDecode:
    """A decoding step with adapters; hashed by value, so that models of one shape share a compilation."""

    step: DecodeStep
    scales_bias: bool

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        with adapt_linears(scales_bias=self.scales_bias):
            return self.step(*arguments, **inputs)


class HyLoRADAModel:
    """A language model whose weights stay frozen, with adapters that train.

        y = (x Wᵀ + s·(x Aᵀ) Bᵀ)·c + bias   in every adapted layer

    Attributes:
        base: the base model behind one face, ours or HF's.
        config: what is adapted.
        adapters: the trainable tree, paths as in ``base.params``. Assign to it to change the adapters.
        frozen: what the adapters stand on: {"params": base.params, "norms": ‖W‖² of the adapted layers}.

    Args:
        base_model: a :class:`CausalLM` from :func:`load_model`, or one of HF's Flax models.
        config: the adapter's settings.
        seed: of the initial lora_A.

    Raises:
        TargetError: a target matches no layer.
        NotBuiltError: the config enables a component that this version does not provide.
        ModelError: the base model is not one that can be adapted, or is known to compute wrongly.

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
    """

    def __init__(self, base_model: Any, config: HyLoRADAConfig, seed: int = 0) -> None:
        self.base = as_base(base_model)
        self.config = config
        self._linears = find_linears(self.base.init_params)
        self.sites = build.plan(self._linears, config)
        norms = build.build_norms(self.sites, self.base.params)
        self.frozen: dict[str, Any] = {"params": self.base.params, "norms": norms}
        self.adapters = build.build_adapters(self.sites, norms, config, seed)
        self._enabled = True
        self._jitted, self._resolve = jax.jit(self.apply), jax.jit(self.resolve)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Any:
        """The model's output in evaluation mode, as HF's models give it: ``.logits`` [batch, seq, vocab].

        Args:
            input_ids: int [batch, seq].
            attention_mask: 1 for tokens, 0 for padding, on either side [batch, seq].
            position_ids: int [batch, seq]; counted from the mask or the segments when absent.
            segment_ids: packed documents 1, 2, …, padding 0 [batch, seq]; our decoder only.
        """
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "segment_ids": segment_ids}
        if not self._enabled:
            return self.base(input_ids, **inputs)
        return self._jitted(self.adapters, input_ids, frozen=self.frozen, **inputs)

    def apply(
        self,
        adapters: Tree,
        input_ids: Array,
        *,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        frozen: Tree | None = None,
        **inputs: Any,
    ) -> Any:
        """The model's output as a pure function of the adapters, to jit and differentiate.

        Args:
            adapters: a tree like ``model.adapters``.
            input_ids: int [batch, seq].
            train: apply ``lora_dropout``.
            rngs: {"dropout": key}, needed when ``train`` and ``lora_dropout`` > 0.
            frozen: ``model.frozen``; pass it through your jit's arguments to keep the weights out of the
                compiled program.
            inputs: attention_mask, position_ids, segment_ids, as in calling the model.

        Returns:
            The base model's output, with ``.logits``.
        """
        resolved = self.resolve(adapters, frozen)
        return self.apply_resolved(resolved, input_ids, train=train, rngs=rngs, frozen=frozen, **inputs)

    def resolve(self, adapters: Tree, frozen: Tree | None = None) -> dict[str, Any]:
        """A, s·B and c of every adapted layer: what depends on weights only, for once per step.

        Args:
            adapters: a tree like ``model.adapters``.
            frozen: ``model.frozen``.
        """
        frozen = self.frozen if frozen is None else frozen
        return resolve(self.sites, adapters, frozen["params"], frozen["norms"], self.config)

    def apply_resolved(self, resolved: Tree, input_ids: Array, **arguments: Any) -> Any:
        """As :meth:`apply`, from the result of :meth:`resolve`."""
        return self._run(self.base.forward, resolved, input_ids, **arguments)

    def hidden_resolved(self, resolved: Tree, input_ids: Array, **arguments: Any) -> Array:
        """The states [batch, seq, d] that the output head reads, from the result of :meth:`resolve`."""
        return self._run(self.base.hidden, resolved, input_ids, **arguments)

    def head(self, frozen: Tree | None = None) -> Array:
        """The output embedding [vocab, d]."""
        return self.base.head({"params": (self.frozen if frozen is None else frozen)["params"]})

    def _run(
        self,
        function: Any,
        resolved: Tree,
        *arguments: Any,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        frozen: Tree | None = None,
        **inputs: Any,
    ) -> Any:
        frozen = self.frozen if frozen is None else frozen
        dropout = self.config.lora_dropout if train else 0.0
        with adapt_linears(dropout=dropout, scales_bias=self.config.magnitude_scales_bias):
            return function(
                {"params": frozen["params"], COLLECTION: resolved}, *arguments, rngs=rngs, **inputs
            )

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        """Continues prompts with a KV cache; the adapters are resolved once for the whole generation.

        Args:
            prompts: token ids, one list per prompt, of any lengths.
            settings: max_new_tokens, temperature, top_k, top_p, eos_token_id, rng, as in
                :func:`hylorada_jax.models.generate.generate`.

        Returns:
            The new tokens of every prompt.
        """
        if not self._enabled:
            return self.base.generate(prompts, **settings)
        variables = {"params": self.base.params, COLLECTION: self._resolve(self.adapters, self.frozen)}
        scales_bias = self.config.magnitude_scales_bias
        if isinstance(self.base, CausalLM):
            decode = _AdaptedDecode(DecodeStep(self.base.module), scales_bias)
            return generate(decode, self.base.init_cache, variables, prompts, **settings)
        with adapt_linears(scales_bias=scales_bias):
            return self.base.generate(prompts, variables=variables, **settings)

    @property
    def num_trainable(self) -> int:
        """The number of trainable parameters."""
        return build.count_parameters(self.sites, self.config)

    def print_trainable_parameters(self) -> None:
        """Prints the trainable and the total number of parameters."""
        total = self.num_trainable + sum(leaf.size for leaf in jax.tree.leaves(self.base.params))
        share = 100 * self.num_trainable / total
        print(f"trainable params: {self.num_trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which calling the model, or generating with it, gives exactly the base model."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def merge_and_unload(self) -> Any:
        """The base model with the adapters folded into a copy of the adapted weights.

            W' = c ⊙ (W + s·B A)

        Returns:
            A model of the kind that was given; the frozen base itself is unchanged.
        """
        resolved = self._resolve(self.adapters, self.frozen)
        params = merge(self.sites, resolved, self.base.params, self.config)
        return self.base.with_params(params)

    def _identity(self) -> dict[str, Any]:
        shapes = [(name, linear.d_out, linear.d_in) for linear in self._linears for name in linear.names]
        return {
            "name": self.base.name,
            "model_type": self.base.config.model_type,
            "layers_sha256": hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest(),
        }

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapter: adapter_config.json and adapter_model.safetensors.

        Args:
            directory: made if it does not exist.
            overwrite: replace an adapter that is already there.

        Raises:
            CheckpointError: an adapter is already there, or cannot be written.
        """
        tensors = layout.flatten(self.sites, self.adapters)
        adapter_files.write_adapter(directory, tensors, self.config, self._identity(), overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, base_model: Any, directory: str | Path) -> "HyLoRADAModel":
        """The model with a saved adapter on it.

        Args:
            base_model: the base model the adapter was trained on.
            directory: what :meth:`save_pretrained` wrote.

        Raises:
            CheckpointError: the adapter is damaged, or does not fit the base model.
        """
        tensors, config, base = adapter_files.read_adapter(directory)
        model = cls(base_model, config)
        adapter_files.check_base(base, model._identity())
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        adapter_files.check_keys(shapes, layout.tensor_shapes(model.sites, config))
        model.adapters = layout.unflatten(model.sites, tensors, config)
        return model
