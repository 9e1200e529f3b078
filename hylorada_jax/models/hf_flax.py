"""Hugging Face's Flax models behind the face of a base model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hylorada_jax.errors import ModelError
from hylorada_jax.math.attention import default_positions
from hylorada_jax.models.base_model import require_generation
from hylorada_jax.models.families import family_of, flax_of, that_can
from hylorada_jax.models.families.family import Flax
from hylorada_jax.models.generate import check_settings, is_greedy, not_finite, pad_left
from hylorada_jax.models.hf_attention import SharedAttention
from hylorada_jax.models.hf_flax_faults import check_hf_flax
from hylorada_jax.models.hf_head import float32_logits
from hylorada_jax.models.ids import check_prompts, check_tokens
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.weights import TreePath

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PretrainedConfig


@dataclass(frozen=True, eq=False)
class HFFlaxModel:
    """A Hugging Face Flax model with the face of a base model; its weights are shared, never copied.

    The frozen base runs deterministically, also in training: `rngs` reach the adapters, not its own dropout.
    GPT-2 and BERT count positions from the first real token, so that padding on either side changes nothing.
    The defaults of other families are Hugging Face's own: most need `position_ids` for left-padded batches.

    Args:
        model: the model; use `wrap`, which refuses those that are known to compute wrongly.
    """

    model: FlaxPreTrainedModel

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
    def wrap(cls, model: FlaxPreTrainedModel) -> HFFlaxModel:
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
            ModelError: packed documents or groups, which most of these models cannot keep apart.
            DataError: a token id or a position that the model's table does not have. Ids are read where
                their values are known; under ``jax.jit`` or the like one outside goes unnoticed, and the
                output means nothing.
        """
        self._check_ids(input_ids=input_ids, **inputs)
        input_ids = jnp.asarray(input_ids)
        self._check_support(segment_ids, groups)
        check_range(input_ids.shape, position_ids, self.position_limit)
        if (answer := inputs.get("decoder_input_ids")) is not None:
            check_range(jnp.shape(answer), limit=self.position_limit)
        if segment_ids is not None:
            segment_ids = jnp.asarray(segment_ids)
        if position_ids is None:
            position_ids = self._counted(input_ids.shape, inputs.get("attention_mask"), segment_ids)
        given = {"position_ids": position_ids, **inputs}
        model = self._bound(variables, rngs or {}, segment_ids, groups)
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
        if segment_ids is not None and not self.supports_segments:
            raise ModelError(
                "Packed documents need a model that keeps them apart.",
                f"segment_ids for {type(self.model).__name__}",
                "Use one document per row (padding instead of packing), or a model of type "
                f"{that_can('segments')}.",
            )
        if groups is not None and not self.supports_groups:
            raise ModelError(
                "Shifted sparse attention needs a causal model whose attention is ours.",
                f"groups={groups} for {type(self.model).__name__}",
                f"Leave groups out, or choose a model of type {that_can('groups')}.",
            )

    def _counted(self, shape: tuple[int, ...], mask: Any, segment_ids: Array | None) -> Array | None:
        # BERT's multiple choice has three axes, and keeps Hugging Face's positions.
        if not self.supports_segments or len(shape) != 2 or (mask is None and segment_ids is None):
            return None
        mask = None if mask is None else jnp.asarray(mask, jnp.int32)
        return default_positions(shape, attention_mask=mask, segment_ids=segment_ids)

    def _bound(
        self,
        variables: Mapping[str, Any],
        rngs: Mapping[str, Array],
        segment_ids: Array | None = None,
        groups: tuple[int, int] | None = None,
    ) -> FlaxPreTrainedModel:
        # HF's call prepares the inputs of each family, but hands the module nothing besides "params": so it
        # gets a stand-in for the module, in a copy of the model, which adds the rest.
        model = copy.copy(self.model)
        model._module = _Bound(self.model.module, variables, rngs, segment_ids, groups)
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
        eos_token_id: int | Sequence[int] | None = None,
        rng: Array | None = None,
    ) -> list[list[int]]:
        """Continues prompts by Hugging Face's own generation; the settings are those of our decoder's.

        Args:
            prompts: token ids, one list per prompt, of any lengths; what the encoder reads, if there is one.
            variables: as in `forward`; the model's own parameters when absent.
            max_new_tokens: tokens to add at most.
            temperature: 0 takes the most likely token.
            top_k: sample among the k most likely.
            top_p: sample among the most likely that together have probability p.
            eos_token_id: the token or tokens that end a row; None: the model's own; (): none.
            rng: a `jax.random` key, needed when temperature > 0.

        Returns:
            The new tokens of every prompt, with the end token if one came.

        Raises:
            ModelError: the model generates no text.
            ConfigError: a setting is out of range.
            DataError: there is no prompt; one is empty, has a token id outside the vocabulary, or leaves no
                room in the model's table of positions.
            NonFiniteError: a logit is NaN or infinite.
        """
        require_generation(self)
        check_prompts(prompts, self.token_limit)
        check_settings(prompts, max_new_tokens, temperature, top_k, top_p, rng)
        ends = self.end_token_ids if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
        ids = pad_left(prompts, bucket=False)
        mask = pad_left([[1] * len(prompt) for prompt in prompts], bucket=False)
        width = ids.shape[1]
        if self.config.is_encoder_decoder:
            # An encoder may count positions from the first column; the answer begins with one start token.
            ids, mask = (
                np.stack([np.roll(r, sum(m)) for r, m in zip(x, mask, strict=True)]) for x in (ids, mask)
            )
            width = 1
        check_range((len(prompts), width + max_new_tokens), limit=self.position_limit)
        greedy = is_greedy(temperature)
        sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        model = self._bound(variables or {"params": self.params}, {})
        sequences = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            num_beams=1,  # whatever the config says: each token is chosen by itself
            logits_processor=[_flag_not_finite],
            # Hugging Face stops at one token, and for None at the config's. For several, as for none, it gets
            # one that is beyond the last, and the rows are cut below.
            eos_token_id=ends[0] if len(ends) == 1 else self.config.vocab_size,
            pad_token_id=ends[0] if len(ends) == 1 else 0,
            prng_key=rng,
            **{name: value for name, value in sampling.items() if value is not None},
        ).sequences
        rows = np.asarray(sequences)[:, width:].tolist()
        mark = self.config.vocab_size
        if broken := [(row.index(mark) + 1, number) for number, row in enumerate(rows, 1) if mark in row]:
            token, number = min(broken)
            raise not_finite(f"at new token {token} of prompt {number}")
        lengths = (next((i + 1 for i, token in enumerate(row) if token in ends), None) for row in rows)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

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
        kind = type(self.model).__name__
        if "loss" not in self._family.can or not kind.endswith(("LMHeadModel", "ForCausalLM")):
            raise ModelError(
                "The built-in loss needs a causal language model whose logits are hidden states times an "
                f"embedding: one of type {that_can('loss')}.",
                kind,
                "Call the adapted model and compute your own loss from its output.",
            )
        return tuple(family_of(self.config.model_type).embedding.split("."))


def _flag_not_finite(sequences: Array, logits: Array, length: Array) -> Array:
    """Logits with a column more, of a token that is chosen if and only if they are not finite.

    So Hugging Face's loop, which gives out nothing but tokens, need not stop for it. −∞ is allowed: other
    processors before this one forbid tokens by it.
    """
    is_finite = jnp.all(logits < jnp.inf, axis=-1, keepdims=True)
    kept = jnp.where(is_finite, logits, -jnp.inf)
    return jnp.concatenate([kept, jnp.where(is_finite, -jnp.inf, 0).astype(kept.dtype)], axis=-1)


@dataclass(frozen=True)
class _Bound:
    """A module whose `apply` adds to what Hugging Face's call gives it, with our attention and logits."""

    module: nn.Module
    variables: Mapping[str, Any]
    rngs: Mapping[str, Array]
    segment_ids: Array | None
    groups: tuple[int, int] | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def apply(self, inputs: Mapping[str, Any], *args: Any, rngs: Mapping[str, Array], **kwargs: Any) -> Any:
        with SharedAttention(self.segment_ids, self.groups), float32_logits():
            return self.module.apply(
                {**inputs, **self.variables}, *args, rngs={**rngs, **self.rngs}, **kwargs
            )
