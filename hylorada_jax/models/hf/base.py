"""Hugging Face's Flax models as base models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import FlaxPreTrainedModel, PretrainedConfig
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D
from transformers.models.t5.modeling_flax_t5 import FlaxT5LayerNorm

from hylorada_jax.errors import ModelError
from hylorada_jax.io.hub import recorded_name
from hylorada_jax.math.position import default_positions
from hylorada_jax.models.base_model import require_generation, require_groups, require_segments
from hylorada_jax.models.families import flax_of
from hylorada_jax.models.families.family import Flax
from hylorada_jax.models.hf.bound import bind
from hylorada_jax.models.hf.faults import check_hf_flax
from hylorada_jax.models.hf.generate import generate
from hylorada_jax.models.hf.head import embedding_path
from hylorada_jax.models.ids import check_prompts, check_tokens
from hylorada_jax.models.module_kinds import register, register_linear
from hylorada_jax.models.positions import check_range
from hylorada_jax.shapes import check_rows

# Every Flax model of transformers passes through this file before adapters attach to it.
register_linear(FlaxConv1D, out_in=True)
register(FlaxT5LayerNorm, "norm")


@dataclass(frozen=True, eq=False)
class HFFlaxModel:
    """A Hugging Face Flax model as a base model; its weights are shared, never copied.

    The frozen base runs deterministically, also in training: `rngs` reach the adapters, not its own dropout.
    GPT-2 and BERT count positions from the first real token, so that padding on either side changes nothing.
    The defaults of other families are Hugging Face's own: most need `position_ids` for left-padded batches.

    Args:
        model: the model; use `wrap`, which refuses those that are known to compute wrongly.
    """

    model: FlaxPreTrainedModel

    inside = False

    @property
    def _family(self) -> Flax:
        return flax_of(self.config.model_type)

    @property
    def supports_segments(self) -> bool:
        """Whether it can keep packed documents apart."""
        return "segments" in self._family.can

    @property
    def supports_groups(self) -> bool:
        """Whether it can attend in the groups of shifted sparse attention."""
        return "groups" in self._family.can

    @property
    def supports_generation(self) -> bool:
        """Whether it can continue prompts."""
        return self.model.can_generate()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompts, and a decoder writes the answers."""
        return bool(self.config.is_encoder_decoder)

    logit_soft_cap = None
    layer_numbers: ClassVar[Mapping[tuple[str, ...], tuple[int, ...]]] = {}

    @property
    def position_limit(self) -> int | None:
        """Tokens that its table of positions has rows for; None where it has no table."""
        if self._family.positions is None:
            return None
        padding = self.config.pad_token_id + 1 if self._family.positions == "after padding" else 0
        return self.config.max_position_embeddings - padding

    @property
    def token_limit(self) -> int | None:
        """Rows of its table of tokens; None where its input is not tokens."""
        takes_tokens = self.model.main_input_name == "input_ids"
        return getattr(self.config, "vocab_size", None) if takes_tokens else None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as the model's generation config names them."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        return () if named is None else tuple(np.atleast_1d(named).tolist())

    @classmethod
    def wrap(cls, model: Any) -> HFFlaxModel:
        """A model as a base model.

        Args:
            model: any Flax model of transformers that holds its weights, wrapped already or not.

        Returns:
            The base model.

        Raises:
            ModelError: the model computes wrongly for its config, see `check_hf_flax`, or has no weights.
        """
        if isinstance(model, cls):
            return model
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
    def dtype(self) -> Any:
        """Of the computation."""
        return jnp.dtype(self.model.dtype)

    @property
    def config(self) -> PretrainedConfig:
        """Hugging Face's config."""
        return self.model.config

    @property
    def name(self) -> str:
        """What the model was loaded from, or its class for a model made from a config."""
        return recorded_name(self.config.name_or_path) or type(self.model).__name__

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
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        groups: tuple[int, int] | None = None,
        rngs: Mapping[str, Array] | None = None,
        **inputs: Any,
    ) -> Any:
        """Hugging Face's output, as a pure function of the variables.

        Args:
            variables: {"params": …}, and perhaps further collections, such as the adapters'.
            input_ids: tokens.
            position_ids: positions; by default counted by ``default_positions`` for GPT-2 and BERT, and by
                Hugging Face for others.
            segment_ids: packed documents 1, 2, 3 …, 0 for padding; a token sees its own document only.
            groups: size and shift of shifted sparse attention's groups; None: full attention.
            rngs: keys for dropout inside adapters.
            inputs: what the model's own call takes: attention_mask, decoder_input_ids …; those that are None
                are left to its defaults.

        Returns:
            The output of the model's class, with `.logits` where it has a head.

        Raises:
            ConfigError: packed documents, which most of these models cannot keep apart.
            ModelError: groups of tokens, likewise.
            DataError: a token id or a position that the model's table does not have. Ids are read where
                their values are known; under ``jax.jit`` or the like one outside goes unnoticed, and the
                output means nothing.
        """
        self._check_ids(input_ids=input_ids, **inputs)
        input_ids = jnp.asarray(input_ids)
        self._check_support(segment_ids, groups)
        check_range(input_ids.shape, position_ids, self.position_limit)
        check_rows(input_ids.shape, attention_mask=inputs.get("attention_mask"), segment_ids=segment_ids)
        if (answer := inputs.get("decoder_input_ids")) is not None:
            check_range(jnp.shape(answer), limit=self.position_limit)
        if segment_ids is not None:
            segment_ids = jnp.asarray(segment_ids)
        if position_ids is None:
            position_ids = self._counted(input_ids.shape, inputs.get("attention_mask"), segment_ids)
        given = {"position_ids": position_ids, **inputs}
        model = bind(self.model, variables, rngs or {}, segment_ids, groups)
        return model(
            input_ids, return_dict=True, **{name: value for name, value in given.items() if value is not None}
        )

    def _check_ids(self, **inputs: Any) -> None:
        tables = {"input_ids": self.token_limit, "decoder_input_ids": self.token_limit}
        tables["token_type_ids"] = getattr(self.config, "type_vocab_size", None)
        for name, rows in tables.items():
            if inputs.get(name) is not None:
                check_tokens(inputs[name], rows, name)

    def _check_support(self, segment_ids: Any, groups: Any) -> None:
        if segment_ids is not None:
            require_segments(self, f"segment_ids for {type(self.model).__name__}")
        if groups is not None:
            require_groups(self, f"groups={groups} for {type(self.model).__name__}")

    def _counted(self, shape: tuple[int, ...], mask: Any, segment_ids: Array | None) -> Array | None:
        # BERT's multiple choice has three axes, and keeps Hugging Face's positions.
        if not self.supports_segments or len(shape) != 2 or (mask is None and segment_ids is None):
            return None
        mask = None if mask is None else jnp.asarray(mask, jnp.int32)
        return default_positions(shape, attention_mask=mask, segment_ids=segment_ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, variables: Mapping[str, Any] | None = None, **settings: Any
    ) -> list[list[int]]:
        """Continues prompts by Hugging Face's own generation; the settings are those of our decoder's.

        What the model's generation config forbids or forces (min_length, no_repeat_ngram_size, suppressed and
        forced tokens) is heeded as in transformers, for greedy and for sampled tokens; its beams are not.

        Args:
            prompts: token ids, one list per prompt, of any lengths; what the encoder reads, if there is one.
            variables: as in `forward`; the model's own parameters when absent.
            **settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id,
                rng; without eos_token_id the model's own end tokens count, and with () none.

        Returns:
            The new tokens of every prompt, with the end token if one came.

        Raises:
            ModelError: the model generates no text, or its generation config has a constraint out of bounds.
            ConfigError: a setting is out of range.
            DataError: there is no prompt; one is empty, has a token id outside the vocabulary, or leaves no
                room in the model's table of positions.
            NonFiniteError: a logit is NaN or infinite.
        """
        require_generation(self)
        check_prompts(prompts, self.token_limit)
        if settings.get("eos_token_id") is None:
            settings["eos_token_id"] = self.end_token_ids
        model = bind(self.model, variables or {"params": self.params})
        return generate(self, model, prompts, **settings)

    def stream(self, prompt: Sequence[int], **settings: Any) -> Iterator[list[int]]:
        """What `generate` gives for one prompt: all at once, for Hugging Face's loop shows nothing before."""
        return iter(self.generate([prompt], **settings))

    def hidden(
        self, variables: Mapping[str, Any], input_ids: Int[Array, "batch seq"], **inputs: Any
    ) -> Float[Array, "batch seq d"]:
        """The states that the output head reads; the arguments are those of `forward`.

        Under `jax.jit`, XLA drops the logits that are computed beside them.
        """
        embedding_path(self.model)
        return self.forward(variables, input_ids, output_hidden_states=True, **inputs).hidden_states[-1]

    def head(self, variables: Mapping[str, Any]) -> Float[Array, "vocab d"]:
        """The output embedding, tied or not: logits = hidden · headᵀ."""
        path, params = embedding_path(self.model), variables["params"]
        if not self.config.tie_word_embeddings:
            return params["lm_head"]["kernel"].T
        for key in path:
            params = params[key]
        return params["embedding"]
