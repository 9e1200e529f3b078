"""What one file of this package says of a family of models.

Imports neither jax nor torch: both packages read their names of layers here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.models.bounds import (
    Deviation,
    Dropout,
    Epsilon,
    Heads,
    Layers,
    Positions,
    Tokens,
    Vocabulary,
    Width,
)

Capability = Literal["loss", "segments", "groups", "daa"]
"""The built-in loss, packed documents, the groups of S²-Attn, direct attention adaptation."""


class Keys(Struct, frozen=True, kw_only=True):
    """The keys that our decoder reads beside those of ``rope_config``; transformers' defaults for Llama."""

    vocab_size: Vocabulary = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    max_position_embeddings: Positions = 2048
    hidden_act: str = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Dropout = 0.0  # no effect: the frozen base has none, in training either
    initializer_range: Deviation = 0.02
    eos_token_id: Tokens = 2
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Meta(ge=0)] = 28


class Mixture(NamedTuple):
    """A mixture of experts in the place of a layer's MLP, or beside it.

    Attributes:
        experts: how many there are.
        chosen: how many of them each token has.
        width: inside each.
        normalised: the weights of a token's experts are made to sum to 1.
        name: of the block in a layer.
        router: the linear layer in it that weighs the experts.
        layers: those of an expert: gate, up, down.
    """

    experts: int
    chosen: int
    width: int
    normalised: bool = True
    name: str = "mlp"
    router: str = "gate"
    layers: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What families compute differently, as fields of ``DecoderConfig``, where each is explained.

    A default is what a family has that does not name the field.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    mixture: Mixture | None = None
    dense_layers: tuple[bool, ...] = ()
    shared_expert: int | None = None
    mixture_beside: bool = False
    swiglu_limit: float | None = None
    attention_sinks: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    value_norm: bool = False
    keys_as_values: bool = False
    full_head_dim: int | None = None
    full_kv_heads: int | None = None
    fused: bool = False
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    norm_rounded_last: bool = False
    layer_scalar: bool = False
    per_layer_width: int | None = None
    per_layer_vocab: int | None = None
    shared_kv_layers: int = 0
    shared_kv_mlp: int | None = None
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    rotary_fraction: float = 1.0
    sliding_rope_theta: float | None = None
    unrotated_layers: tuple[bool, ...] = ()
    embedding_scale: float = 1.0
    embedding_scale_rounded: bool = False
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """What llama.cpp makes of a family.

    Attributes:
        architecture: its name there.
        tensors: its names of a layer's tensors, beside those of Llama's, and HF's.
        biases: {key of config.json that turns biases on: a tensor whose bias is there then}.
        interleaved: in the rows of q and k, the two halves that rotate against each other alternate.
        keys: its keys beside those of all architectures, and config.json's.
        settings: what config.json would hold, as far as the file says it → what the file does not say.
        norm_offset: what the weights of norms have been added.
    """

    architecture: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: {}
    norm_offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """How our decoder reads a family.

    Attributes:
        causal_lm: transformers' class of it in torch.
        keys: of config.json.
        options: the values of these keys → what it computes differently.
        gguf: None where a GGUF file has it under another family's name, or not at all.
        rope_theta: the base of the rotary wavelengths where config.json names none.
        settings: the content of config.json → the same in the layout of transformers 4.57.
        text_of: the multimodal model_types whose text part it is.
        whole_caps_logits: these apply final_logit_softcapping too.
        experts_out_in: its tensors of all experts are [experts, out, in], and not the other way round.
        quantized: of :mod:`~hylorada_jax.models.quantized_elsewhere`, what its checkpoints are read in beside
            what those of all families are.
    """

    causal_lm: str
    keys: type[Keys]
    options: Callable[[Any], Options]
    gguf: GGUF | None = None
    rope_theta: float = 10000.0
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: said
    text_of: tuple[str, ...] = ()
    whole_caps_logits: bool = False
    experts_out_in: bool = False
    quantized: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Flax:
    """How transformers' Flax classes of a family run here.

    They were held to their torch models with every option away from its default.

    Attributes:
        can: what they can do beside linear and sparse adapters.
        faults: its ``PretrainedConfig`` → {what the class would compute wrongly: whether it would}.
        positions: what the table of positions holds; "after padding": first rows of padding; None: no table.
        largest_table: the numbers that such a table may have.
        depths: the keys that count layers whose weights are their own.
        divisors: the keys that count heads among which the width of the model is divided.
        repaired: it computes relative positions by ``relative_buckets``.
        settings: the content of config.json → the same as transformers 4.57 understands it.
    """

    can: tuple[Capability, ...] = ()
    faults: Callable[[Any], Mapping[str, bool]] = lambda config: {}
    positions: Literal["positions", "after padding"] | None = "positions"
    largest_table: int = 2**25
    depths: tuple[str, ...] = ("num_hidden_layers", "num_decoder_layers")
    divisors: tuple[str, ...] = ("num_attention_heads",)
    repaired: bool = False
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: said


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models. The defaults are the names of Llama, which most decoders have taken over.

    A name is the end of a module's full name in HF's model; Flax has the same.

    Attributes:
        model_type: its name in config.json.
        q, k, v, o: the projections of attention; one name more than once where one layer is several of them.
        mlp_output: the last linear layer of an MLP block; None: there is no such layer for all tokens.
        router: the linear layer that weighs the experts of a mixture.
        cross_attention: the attention that reads an encoder.
        embedding: of tokens; its full name.
        heads: the output layers, first the language model's.
        relative_positions: a table that is an ``nn.Embed``, but embeds no token and no position.
        task: PEFT's wrapper of the model; None: the plain one.
        tokenizer: the class of its tokenizer, for a directory that names none.
        decoder: how our decoder reads it; None: it does not.
        flax: how transformers' Flax classes of it run here; None: not at all.
    """

    model_type: str
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    mlp_output: str | None = "mlp.down_proj"
    router: str | None = None
    cross_attention: str | None = None
    embedding: str = "model.embed_tokens"
    heads: tuple[str, ...] = ("lm_head", "score")
    relative_positions: str | None = None
    task: str | None = "CAUSAL_LM"
    tokenizer: str | None = None
    decoder: Decoder | None = None
    flax: Flax | None = None

    def can(self, capability: Capability) -> bool:
        """Whether the model that ``load_model`` makes has a capability."""
        return self.decoder is not None or (self.flax is not None and capability in self.flax.can)


QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
"""llama.cpp's names of the norms of queries and keys, and HF's."""
BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""The same of a layer's norms behind attention and MLP."""


def check_mixture(mixture: Mixture, chosen: str = "num_experts_per_tok") -> Mixture:
    """The mixture, where a token's experts are no more than there are; a ModelError otherwise.

    Args:
        mixture: to be checked.
        chosen: the key that says how many experts a token has.
    """
    if mixture.chosen > mixture.experts:
        raise ModelError(
            "A token chooses no more experts than there are.",
            f"{chosen}={mixture.chosen} of {mixture.experts}",
            "Check config.json.",
        )
    return mixture


def alike(keys: Keys, window: int | None, family: str) -> tuple[int | None, tuple[bool, ...]]:
    """:func:`sliding` of a family all of whose layers have the window, or none where there is none."""
    return sliding(keys, window, [window is not None] * keys.num_hidden_layers, fixed=family)


def sliding(
    keys: Keys, window: int | None, implied: Sequence[bool], *, fixed: str | None = None
) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers that have it: ``sliding_window`` and ``sliding_layers`` of :class:`Options`.

    Args:
        keys: ``layer_types`` is read.
        window: in tokens; None: there is none.
        implied: for each layer, whether it slides where ``layer_types`` is absent.
        fixed: the family, where transformers ignores ``layer_types``.

    Returns:
        The window, None where no layer has it; the layers.

    Raises:
        ModelError: ``layer_types`` is not one type per layer, or contradicts what is implied and fixed; or
            layers slide, and there is no window.
    """
    layers, depth = tuple(implied), keys.num_hidden_layers
    if keys.layer_types is not None:
        layers = tuple(kind == "sliding_attention" for kind in keys.layer_types)
        if len(layers) != depth:
            raise ModelError(
                "layer_types names 'full_attention' or 'sliding_attention' for each layer.",
                f"layer_types of {len(layers)}; num_hidden_layers={depth}",
                "Check layer_types in config.json.",
            )
        if fixed and layers != tuple(implied):
            raise ModelError(
                f"All layers of a {fixed} model attend alike (transformers ignores layer_types here).",
                f"layer_types with {sum(layers)} of {depth} sliding, sliding_window={window}",
                "Remove layer_types from config.json.",
            )
    if any(layers) and window is None:
        raise ModelError(
            "Layers of sliding attention have a window.",
            f"sliding_window={window}, and {sum(layers)} of {depth} layers slide",
            "Check layer_types, sliding_window and use_sliding_window in config.json.",
        )
    return (window if any(layers) else None), layers
