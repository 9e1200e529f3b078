"""Hugging Face's Flax models behind the face of a base model. The only file that imports transformers."""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np
import transformers
from flax.traverse_util import flatten_dict
from jax import Array
from jaxtyping import Float, Int
from transformers import FlaxPreTrainedModel, PretrainedConfig
from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

from hylorada_jax.errors import ModelError
from hylorada_jax.models.generate import check_settings
from hylorada_jax.models.hf_flax_faults import check_hf_flax
from hylorada_jax.models.source import Source
from hylorada_jax.models.weights import Slot, TreePath, Weights, check_match, load_tree, shorten

# Where a tied output embedding lies, for the families whose logits are exactly hidden · headᵀ.
_EMBEDDINGS: dict[str, TreePath] = {
    "gpt2": ("transformer", "wte"),
    "gpt_neo": ("transformer", "wte"),
    "bloom": ("transformer", "word_embeddings"),
    "opt": ("model", "decoder", "embed_tokens"),
    "xglm": ("model", "embed_tokens"),
    "llama": ("model", "embed_tokens"),
    "mistral": ("model", "embed_tokens"),
    "gemma": ("model", "embed_tokens"),
}

# Constants that old PyTorch checkpoints carry as tensors: causal masks, position numbers, rotary frequencies.
_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.position_ids$|\.inv_freq$")


@dataclass(frozen=True, eq=False)
class HFFlaxModel:
    """A Hugging Face Flax model with the face of a base model; its weights are shared, never copied.

    The frozen base runs deterministically, also in training: `rngs` reach the adapters, not its own dropout.
    Defaults are Hugging Face's own; most families count positions from the first column, padded or not, so
    left-padded batches need `position_ids`.

    Args:
        model: the model; use `wrap`, which refuses those that are known to compute wrongly.
    """

    model: FlaxPreTrainedModel

    supports_segments = False

    @classmethod
    def wrap(cls, model: FlaxPreTrainedModel) -> "HFFlaxModel":
        """The face of a model.

        Args:
            model: any Flax model of transformers that holds its weights.

        Returns:
            The face.

        Raises:
            ModelError: the model computes wrongly for its config, see `check_hf_flax`, or has no weights.
        """
        check_hf_flax(model.config)
        if not model._is_initialized:
            raise ModelError(
                "A base model must hold its weights.",
                f"{type(model).__name__} made with _do_init=False",
                "Leave _do_init out, or load it with hylorada_jax.load_model(name).",
            )
        return cls(model)

    @property
    def module(self) -> nn.Module:
        """The Linen module."""
        return self.model.module

    @property
    def params(self) -> dict[str, Any]:
        """The parameter tree of the model itself."""
        return self.model.params

    @property
    def config(self) -> PretrainedConfig:
        """Hugging Face's config."""
        return self.model.config

    @property
    def name(self) -> str:
        """What the model was loaded from, or its class for a model made from a config."""
        return self.config.name_or_path or type(self.model).__name__

    def init_params(self, rng: Array) -> dict[str, Any]:
        """Fresh random parameters.

        Args:
            rng: a `jax.random` key.

        Returns:
            A tree like `params`.
        """
        return self.model.init_weights(rng, self.model.input_shape)

    def with_params(self, params: Mapping[str, Any]) -> FlaxPreTrainedModel:
        """The Hugging Face model with other parameters; this one stays as it is.

        Args:
            params: a tree like `params`.

        Returns:
            A model of the same class.
        """
        model = copy.copy(self.model)
        model.params = params
        return model

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Int[Array, "batch seq"] | None = None,
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> Any:
        """Hugging Face's output; the arguments are those of `forward`."""
        return self.forward(
            {"params": self.params},
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
        )

    def forward(
        self,
        variables: Mapping[str, Any],
        input_ids: Int[Array, "batch seq"],
        *,
        rngs: Mapping[str, Array] | None = None,
        **inputs: Any,
    ) -> Any:
        """Hugging Face's output, as a pure function of the variables.

        Args:
            variables: {"params": …}, and perhaps further collections, such as the adapters'.
            input_ids: tokens.
            rngs: keys for dropout inside adapters.
            inputs: what the model's own call takes: attention_mask, position_ids, decoder_input_ids …; those
                that are None are left to its defaults.

        Returns:
            The output of the model's class, with `.logits` where it has a head.

        Raises:
            ModelError: packed documents, which these models cannot keep apart.
        """
        if inputs.pop("segment_ids", None) is not None:
            raise ModelError(
                "Packed documents need a model that keeps them apart.",
                f"segment_ids for {type(self.model).__name__}",
                "Use one document per row (padding instead of packing), or a model of the Llama family.",
            )
        model = self._bound(variables, rngs or {})
        given = {key: value for key, value in inputs.items() if value is not None}
        return model(input_ids, return_dict=True, **given)

    def _bound(self, variables: Mapping[str, Any], rngs: Mapping[str, Array]) -> FlaxPreTrainedModel:
        # HF's call prepares the inputs of each family, but hands the module nothing besides "params": so it
        # gets a stand-in for the module, in a copy of the model, which adds the rest.
        model = copy.copy(self.model)
        model._module = _Bound(self.model.module, variables, rngs)
        return model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        variables: Mapping[str, Any] | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        rng: Array | None = None,
    ) -> list[list[int]]:
        """Continues prompts by Hugging Face's own generation; the settings are those of our decoder's.

        Args:
            prompts: token ids, one list per prompt, of any lengths; padded on the left.
            variables: as in `forward`; the model's own parameters when absent.
            max_new_tokens: tokens to add at most.
            temperature: 0 takes the most likely token.
            top_k: sample among the k most likely.
            top_p: sample among the most likely that together have probability p.
            eos_token_id: the token that ends a row.
            rng: a `jax.random` key, needed when temperature > 0.

        Returns:
            The new tokens of every prompt, with the end token if one came.
        """
        check_settings(prompts, max_new_tokens, temperature, top_k, top_p, rng)
        width = max(map(len, prompts))
        ids = np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], np.int32)
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int32)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}
        model = self._bound(variables or {"params": self.params}, {})
        sequences = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=eos_token_id,
            pad_token_id=0 if eos_token_id is None else eos_token_id,
            prng_key=rng,
            **{name: value for name, value in sampling.items() if value is not None},
        ).sequences
        rows = np.asarray(sequences)[:, width:].tolist()
        return [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in rows]

    def hidden(
        self, variables: Mapping[str, Any], input_ids: Int[Array, "batch seq"], **inputs: Any
    ) -> Float[Array, "batch seq d"]:
        """The states that the output head reads; the arguments are those of `forward`.

        Under `jax.jit`, XLA drops the logits that are computed beside them.
        """
        self._embedding_path()
        return self.forward(variables, input_ids, output_hidden_states=True, **inputs).hidden_states[-1]

    def head(self, variables: Mapping[str, Any]) -> Float[Array, "vocab d"]:
        """The output embedding, tied or not: logits = hidden · headᵀ."""
        path, params = self._embedding_path(), variables["params"]
        if not self.config.tie_word_embeddings:
            return params["lm_head"]["kernel"].T
        for key in path:
            params = params[key]
        return params["embedding"]

    def _embedding_path(self) -> TreePath:
        path, kind = _EMBEDDINGS.get(self.config.model_type), type(self.model).__name__
        if path is None or not kind.endswith(("LMHeadModel", "ForCausalLM")):
            raise ModelError(
                "The built-in loss needs a causal language model whose logits are hidden states times an "
                f"embedding: {', '.join(_EMBEDDINGS)}.",
                kind,
                "Call the adapted model and compute your own loss from its output.",
            )
        return path


class _Bound:
    """A module whose `apply` adds collections and rngs to what Hugging Face's call gives it."""

    def __init__(self, module: nn.Module, variables: Mapping[str, Any], rngs: Mapping[str, Array]) -> None:
        self.module, self.variables, self.rngs = module, variables, rngs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def apply(self, inputs: Mapping[str, Any], *args: Any, rngs: Mapping[str, Array], **kwargs: Any) -> Any:
        return self.module.apply({**inputs, **self.variables}, *args, rngs={**rngs, **self.rngs}, **kwargs)


def empty_model(source: Source, dtype: np.dtype) -> FlaxPreTrainedModel:
    """A Flax model of transformers without weights, from the config alone.

    Args:
        source: a model directory.
        dtype: of the computation.

    Returns:
        The model, of the Flax class that its config's `architectures` names.

    Raises:
        ModelError: transformers has no such Flax class, or it computes wrongly for this config.
    """
    if source.config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise _no_flax_class(source)
    config = transformers.AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    config._name_or_path = source.name
    architecture = (config.architectures or [""])[0]
    flax_class = getattr(transformers, f"Flax{architecture}", None)
    if not architecture or flax_class is None:
        raise _no_flax_class(source)
    check_hf_flax(config)
    return flax_class(config, dtype=dtype, _do_init=False)


def load_hf_flax(source: Source, weights: Weights, dtype: np.dtype) -> FlaxPreTrainedModel:
    """Load a Flax model of transformers from PyTorch's safetensors, one tensor at a time and without torch.

    Args:
        source: a model directory.
        weights: its tensors.
        dtype: of the weights and of the computation.

    Returns:
        The model, of the Flax class that its config's `architectures` names.

    Raises:
        ModelError: transformers has no such Flax class or it computes wrongly, or the weights do not fit.

    Warns:
        UserWarning: tensors that the class has no place for, such as a pooler or a second head.
    """
    model = empty_model(source, dtype)
    config = model.config
    leaves = {path: leaf.shape for path, leaf in flatten_dict(model.params_shape_tree).items()}
    slots = _slots(leaves, weights, model.base_model_prefix)
    check_match(leaves, slots, weights, lambda name: True, source.path)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    leftover = [n for n in weights.shapes if n not in slots and n not in tied and not _BUFFERS.search(n)]
    if leftover:
        warnings.warn(
            f"{source.path}: {type(model).__name__} has no place for {shorten(leftover)}", stacklevel=3
        )
    model._is_initialized = True  # from here on the model accepts and gives out weights
    model.params = load_tree(leaves, slots, weights, dtype)
    return model


def _no_flax_class(source: Source) -> ModelError:
    return ModelError(
        "A base model must be of the Llama family, or one that transformers has in Flax.",
        f"{source.path}: model_type {source.config.get('model_type')!r}, "
        f"architectures {source.config.get('architectures')}",
        "Choose a Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-Neo, OPT, BERT or BART model.",
    )


def _slots(leaves: Mapping[TreePath, tuple[int, ...]], weights: Weights, prefix: str) -> dict[str, Slot]:
    """PyTorch's names to their leaves, as transformers renames them; a leaf without one keeps its path."""
    has_prefix = any(path[0] == prefix for path in leaves)
    slots = {}
    for name, shape in weights.shapes.items():
        parts = tuple(name.split("."))
        if not has_prefix and parts[0] == prefix:
            parts = parts[1:]
        stand_in = np.broadcast_to(np.float32(0), shape)  # only its shape is looked at; it takes no memory
        path, _ = rename_key_and_reshape_tensor(parts, stand_in, leaves, prefix)
        if path not in leaves:
            path = (prefix, *path)
        if path in leaves:
            # A kernel comes from a PyTorch weight by transposition; what keeps its name stays as it is.
            slots[name] = Slot(path, None, transpose=path[-1] == "kernel")
    filled = {slot.path for slot in slots.values()}
    return slots | {".".join(path): Slot(path) for path in leaves if path not in filled}
