"""Our base model: a Linen module, its parameters, and pure functions of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hylorada_jax.math.position import default_positions
from hylorada_jax.math.quantized import float_dtype
from hylorada_jax.models.decoder import DecoderLM, KVCache
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.decoder_layer import Cache
from hylorada_jax.models.generate import Decode, generate, stream
from hylorada_jax.models.ids import check_batch, check_prompts
from hylorada_jax.models.layer_loops import check_remat
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.stacks import layer_numbers, stacks_of
from hylorada_jax.placement.axes import ROWS, TENSOR
from hylorada_jax.placement.shards import in_use, place_in_use
from hylorada_jax.shapes import check_rows

Variables = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalLMOutput:
    """What a forward pass gives.

    Args:
        logits: [batch, seq, vocab], float32 at least.
    """

    logits: Float[Array, "batch seq vocab"]


def param_shapes(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameter tree as shapes, without weights or memory.

    Args:
        config: the decoder's configuration.
        dtype: the dtype of every leaf.

    Returns:
        A tree of ``jax.ShapeDtypeStruct``; leaves under ``layers`` have a leading axis of layers.
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _traced(config))


# Layers of several shapes take a second or two to trace, and a merge or a check of weights asks again.
@lru_cache(maxsize=64)
def _traced(config: DecoderConfig) -> dict[str, Any]:
    return jax.eval_shape(lambda: _flax_init(DecoderLM(config), jax.random.key(0)))


def init_params(config: DecoderConfig, rng: Array, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Random weights as HF draws them: normal(initializer_range), zero biases, unit norms and scalars.

    Args:
        config: the decoder's configuration.
        rng: a ``jax.random`` key.
        dtype: bfloat16, float32 or float64.

    Returns:
        The ``params`` tree.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config, dtype))
    # One draw, cut into leaves: a draw per shape takes XLA several seconds to compile.
    # Drawn in float32 and rounded, so that one key gives one model, whatever the dtype.
    size = sum(leaf.size for _, leaf in leaves)
    drawn = (jax.random.normal(rng, (size,), jnp.float32) * config.initializer_range).astype(dtype)
    params, start = [], 0
    for path, leaf in leaves:
        values = drawn[start : start + leaf.size].reshape(leaf.shape)
        params.append(values if (constant := _start(path)) is None else jnp.full(leaf.shape, constant, dtype))
        start += leaf.size
    return jax.tree_util.tree_unflatten(tree, params)


def _start(path: Any) -> int | None:
    """What a leaf is filled with; None of one that is drawn."""
    ones = ("scale", "layer_scalar", "input_scale", "per_expert_scale")
    return {"bias": 0, **dict.fromkeys(ones, 1)}.get(path[-1].key)


def _flax_init(module: nn.Module, rng: Array) -> dict[str, Any]:
    """The parameters as Flax makes them: of the right shapes, and with every module called."""
    token = jnp.zeros((1, 1), jnp.int32)
    return module.init(rng, token, token)["params"]


@dataclass(frozen=True)
class DecodeStep:
    """The step that ``generate`` repeats, for a bare decoder.

    Hashed by value and free of weights, so that models of one shape share a compiled generation, and it keeps
    none of them alive.

    Args:
        module: the decoder.
    """

    module: DecoderLM

    def __call__(
        self,
        variables: Variables,
        input_ids: Int[Array, "batch query"],
        *,
        position_ids: Int[Array, "batch query"],
        key_valid: Bool[Array, "batch query"] | None = None,
        cache: KVCache,
        empty: bool = False,
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Appends tokens to a cache and predicts what follows.

        Args:
            variables: the collections of the model.
            input_ids: the new tokens, one or many; pad a prompt on its left.
            position_ids: their positions.
            key_valid: False for padding.
            cache: from ``CausalLM.init_cache`` or from the call before; it must have room for them.
            empty: the cache has no tokens yet.

        Returns:
            Logits after the last token of every row, and the cache.
        """
        hidden, cache = self.module.apply(
            variables, input_ids, position_ids, key_valid, cache=cache, empty=empty, method="hidden"
        )
        return self.module.apply(variables, hidden[:, -1], method="logits"), cache


@dataclass(frozen=True, eq=False)
class CausalLM:
    """One of our decoders with its weights.

    The methods that take ``variables`` are pure: ``{"params": …}``, perhaps with ``"hylorada"`` for adapters.

    Args:
        module: the decoder.
        params: its parameter tree.
        config: its configuration.
        name: what the user typed: a directory, a Hub name, 'smollm2-135m'.
        end_token_ids: the tokens that end a text; a model of random weights has none.
        inside: it is the text part of a multimodal model.

    Example:
        >>> config = DecoderConfig.from_hf({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
        ...     "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 11})
        >>> CausalLM.from_config(config, jax.random.key(0))(jnp.array([[1, 2, 3]])).logits.shape
        (1, 3, 11)
    """

    module: nn.Module
    params: dict[str, Any]
    config: DecoderConfig
    name: str
    end_token_ids: tuple[int, ...] = ()
    inside: bool = False

    supports_segments = True
    supports_groups = True
    supports_generation = True
    is_encoder_decoder = False
    position_limit = None

    @property
    def token_limit(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    @property
    def layer_numbers(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The numbers of the layers in each stack of parameters, by its path."""
        return layer_numbers(self.config)

    @classmethod
    def from_config(
        cls,
        config: DecoderConfig,
        rng: Array,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ) -> CausalLM:
        """A model with random weights.

        Args:
            config: its configuration.
            rng: a ``jax.random`` key.
            dtype: of the weights, and so of the computation.
            remat: see ``DecoderLM``.

        Returns:
            The model, named 'random'.

        Raises:
            ModelError: the dtype is none of floating point.
            ConfigError: remat is unknown.
        """
        dtype = float_dtype(dtype)
        module = DecoderLM(config, check_remat(remat))
        return cls(module, _jitted_init_params(config, rng, dtype), config, "random")

    @property
    def logit_soft_cap(self) -> float | None:
        """The bound of the logits; None: none."""
        return self.config.logit_soft_cap

    @property
    def dtype(self) -> Any:
        """Of the weights, and so of the computation."""
        return self.params["model"]["embed_tokens"]["embedding"].dtype

    def init_params(self, rng: Array) -> dict[str, Any]:
        """Random parameters of this model's shape; traced to learn which linear modules there are."""
        return _flax_init(self.module, rng)

    def with_params(self, params: dict[str, Any]) -> CausalLM:
        """This model with other weights of the same shapes."""
        return replace(self, params=params)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Int[Array, "batch seq"] | None = None,
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
    ) -> CausalLMOutput:
        """Logits of every token, compiled; arguments and errors are those of ``forward``."""
        # Here, because under the jit below nobody sees the values.
        check_batch(input_ids, self.token_limit, most=2)
        input_ids = jnp.asarray(input_ids)
        check_range(input_ids.shape, position_ids)
        with in_use(self.params):
            logits = _jitted_logits(
                self.module, {"params": self.params}, input_ids, attention_mask, position_ids, segment_ids
            )
        return CausalLMOutput(logits=logits)

    def forward(
        self,
        variables: Variables,
        input_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Int[Array, "batch seq"] | None = None,
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        groups: tuple[int, int] | None = None,
        rngs: dict[str, Array] | None = None,
    ) -> CausalLMOutput:
        """Logits of every token.

        Args:
            variables: the collections of the model.
            input_ids: tokens.
            attention_mask: 1 for a token, 0 for padding, on either side.
            position_ids: positions; by default counted by ``default_positions``.
            segment_ids: packed documents 1, 2, 3 …, 0 for padding; a token sees its own document only.
            groups: size and shift of shifted sparse attention's groups; None: full attention.
            rngs: keys for dropout inside adapters.

        Returns:
            The output. Logits at padding are finite and mean nothing.

        Raises:
            DataError: input_ids are not [batch, seq], one is outside the vocabulary, or an input has not one
                value for each token. Ids are read where their values are known; under ``jax.jit`` or the
                like one outside goes unnoticed, and the output means nothing.
        """
        check_batch(input_ids, self.token_limit, most=2)
        logits = _apply(
            self.module, variables, input_ids, attention_mask, position_ids, segment_ids, groups, rngs=rngs
        )
        return CausalLMOutput(logits=logits)

    def hidden(
        self,
        variables: Variables,
        input_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Int[Array, "batch seq"] | None = None,
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        groups: tuple[int, int] | None = None,
        rngs: dict[str, Array] | None = None,
    ) -> Float[Array, "batch seq d"]:
        """Hidden states after the final norm; arguments and errors are those of ``forward``."""
        check_batch(input_ids, self.token_limit, most=2)
        inputs = input_ids, attention_mask, position_ids, segment_ids
        return _apply(self.module, variables, *inputs, groups, rngs=rngs, method="hidden")[0]

    def head(self, variables: Variables) -> Float[Array, "vocab d"]:
        """The output embedding, tied or not: logits = hidden · headᵀ."""
        params = variables["params"]
        owner = params["model"]["embed_tokens"] if self.config.tie_word_embeddings else params["lm_head"]
        return owner["embedding"]

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache in the dtype of the weights, cut over the mesh in use.

        Args:
            batch: rows.
            length: slots: the padded prompt and what is to be generated.

        Returns:
            The cache.
        """
        slots = batch, length

        def empty(c: DecoderConfig) -> Cache | None:
            if c.shared_kv_layers:
                return None
            shape = (c.num_hidden_layers, *slots, c.num_key_value_heads, c.head_dim)
            place = place_in_use(shape, None, ROWS, None, TENSOR)
            keys, values = (jnp.zeros(shape, self.dtype, device=place) for _ in range(2))
            return keys, values

        layers = tuple(empty(stack.config) for stack in stacks_of(self.config))
        return KVCache(layers, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool), jnp.int32(0))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        variables: Variables | None = None,
        decode: Decode | None = None,
        **settings: Any,
    ) -> list[list[int]]:
        """Continues prompts.

        Args:
            prompts: token ids, one list per prompt, of any lengths.
            variables: the collections that are decoded with; the model's own parameters when absent.
            decode: the step of decoding; the bare model's when absent.
            **settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id and
                rng of :func:`hylorada_jax.models.generate.generate`; without eos_token_id the model's own end
                tokens count, and with () none.

        Returns:
            The new tokens of every prompt.

        Raises:
            ConfigError: a setting is out of range.
            DataError: there is no prompt, or one that is empty or has a token id outside the vocabulary.
            NonFiniteError: a logit is NaN or infinite.
        """
        check_prompts(prompts, self.token_limit)
        return generate(*self._decoding(variables, decode), prompts, **self._facts(settings))

    def stream(
        self,
        prompt: Sequence[int],
        *,
        variables: Variables | None = None,
        decode: Decode | None = None,
        **settings: Any,
    ) -> Iterator[list[int]]:
        """The tokens that :meth:`generate` gives for one prompt, as they come, some at a time.

        Args:
            prompt: token ids.
            variables, decode, **settings: as for :meth:`generate`, with the same errors.

        Returns:
            An iterator of lists of new tokens.
        """
        check_prompts([prompt], self.token_limit)
        return stream(*self._decoding(variables, decode), prompt, **self._facts(settings))

    def _decoding(self, variables: Variables | None, decode: Decode | None) -> tuple[Any, Any, Variables]:
        return decode or DecodeStep(self.module), self.init_cache, variables or {"params": self.params}

    def _facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, with what the model knows: its end tokens, and how long its cached keys hold."""
        ends, rope = settings.get("eos_token_id"), self.config.rope_scaling
        return settings | {
            "eos_token_id": self.end_token_ids if ends is None else ends,
            "holds": rope.original_max_position_embeddings if rope.rope_type == "longrope" else None,
        }


def _apply(
    module: DecoderLM,
    variables: Variables,
    input_ids: Int[Array, "batch seq"],
    attention_mask: Int[Array, "batch seq"] | None,
    position_ids: Int[Array, "batch seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    groups: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """The module's result: positions filled in, and which keys are not padding."""
    # Users bring numpy arrays too.
    input_ids = jnp.asarray(input_ids)
    check_rows(input_ids.shape, attention_mask=attention_mask, segment_ids=segment_ids)
    position_ids, attention_mask, segment_ids = (
        None if given is None else jnp.asarray(given) for given in (position_ids, attention_mask, segment_ids)
    )
    # Those that a mask counts stand still in padding, and a user's own may be anywhere.
    counted = position_ids is None and attention_mask is None
    if position_ids is None:
        position_ids = default_positions(
            input_ids.shape, attention_mask=attention_mask, segment_ids=segment_ids
        )
    masks = [mask > 0 for mask in (attention_mask, segment_ids) if mask is not None]
    valid = jnp.all(jnp.stack(masks), axis=0) if masks else None
    facts = {"groups": groups, "counted": counted}
    return module.apply(variables, input_ids, position_ids, valid, segment_ids, **facts, **options)


# init_params itself is not jitted: a trace from jax's cache would hide the modules from who looks for them.
_jitted_init_params = jax.jit(init_params, static_argnames=("config", "dtype"))


@partial(jax.jit, static_argnums=0)
def _jitted_logits(module: DecoderLM, variables: Variables, *inputs: Any) -> Float[Array, "batch seq vocab"]:
    """``CausalLM.forward`` compiled once per module, whatever the weights."""
    return _apply(module, variables, *inputs)
