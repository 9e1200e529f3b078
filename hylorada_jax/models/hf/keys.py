"""What config.json may say of a model in Hugging Face's Flax: types and bounds of the keys of all families.

transformers' classes take any value for any key. They fail later, with any exception, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import REMEDY, RULE, Deviation, Epsilon, Heads, Tokens, Vocabulary
from hylorada_jax.models.families import flax_of

# Bounds are above every model of these families: each layer is traced, a mask has positions² elements, and
# tables of sines are made on the host.
_Layers = Annotated[int, Meta(ge=1, le=128)]
_Few = Annotated[int, Meta(ge=1, le=8)]
_Width = Annotated[int, Meta(ge=1, le=2**17)]
_Positions = Annotated[int, Meta(ge=1, le=2**14)]
_Count = Annotated[int, Meta(ge=0, le=2**16)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Token = Annotated[int, Meta(ge=-1, lt=2**24)]  # −1: none
_Kind = Literal["global", "local"]
_Repeated = tuple[Annotated[list[_Kind], Meta(min_length=1, max_length=128)], _Layers]

# No two families mean different things by one key.
_TYPES: dict[Any, str] = {
    Vocabulary: "vocab_size decoder_vocab_size type_vocab_size",
    _Layers: "n_layer n_layers num_layers num_hidden_layers num_decoder_layers encoder_layers decoder_layers",
    _Few: "num_hidden_groups inner_group_num",
    Heads: "n_head n_heads num_heads num_attention_heads num_key_value_heads attention_heads "
    "encoder_attention_heads decoder_attention_heads",
    _Width: "n_embd hidden_size d_model dim d_kv head_dim n_embed embedding_size word_embed_proj_dim "
    "rotary_dim n_inner "
    "intermediate_size d_ff ffn_dim hidden_dim encoder_ffn_dim decoder_ffn_dim",
    _Positions: "n_positions n_ctx max_position_embeddings",
    Annotated[int, Meta(ge=4, le=2**12)]: "relative_attention_num_buckets",
    Annotated[int, Meta(ge=1, lt=2**31)]: "relative_attention_max_distance window_size pretraining_tp",
    _Count: "num_labels chunk_size_feed_forward max_length min_length no_repeat_ngram_size",
    _Few | None: "num_beams num_return_sequences num_beam_groups",
    Epsilon: "layer_norm_epsilon layer_norm_eps rms_norm_eps",
    Deviation: "initializer_range init_std initializer_factor",
    _Share: "dropout dropout_rate attention_dropout activation_dropout hidden_dropout embed_dropout "
    "resid_dropout classifier_dropout layerdrop encoder_layerdrop decoder_layerdrop attn_pdrop embd_pdrop "
    "resid_pdrop attention_probs_dropout_prob hidden_dropout_prob classifier_dropout_prob",
    str: "activation activation_function hidden_act hidden_activation dense_act_fn feed_forward_proj "
    "position_embedding_type",
    bool: "tie_word_embeddings is_decoder is_encoder_decoder add_cross_attention tie_encoder_decoder "
    "scale_embedding do_layer_norm_before enable_bias layer_norm_elementwise_affine slow_but_exact "
    "apply_residual_connection_post_layernorm share_encoder_decoder_embeddings scale_attn_weights "
    "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn attention_bias is_gated_act "
    "sinusoidal_pos_embds scale_decoder_outputs use_bidirectional_attention output_attentions "
    "output_hidden_states use_cache",
    Tokens: "eos_token_id",
    _Token | None: "bos_token_id pad_token_id decoder_start_token_id forced_bos_token_id",
    _Token | list[_Token] | None: "forced_eos_token_id",
    Literal["float64", "float32", "float16", "bfloat16"]: "dtype torch_dtype",
    dict[str, Any]: "quantization_config label2id",
    dict[Annotated[str, Meta(pattern=r"^[0-9]{1,6}\Z")], Any]: "id2label pruned_heads",
    list[_Kind]: "attention_layers",
    list[_Repeated]: "attention_types",
}
_Keys = msgspec.defstruct(
    "_Keys", [(key, kind, None) for kind, keys in _TYPES.items() for key in keys.split()]
)


def check_keys(said: Mapping[str, Any], config_class: type) -> None:
    """Refuses what a config class of transformers should not be given.

    Args:
        said: the content of config.json, without nulls.
        config_class: is to be made from it.

    Raises:
        ModelError: a value is of the wrong type or out of bounds, or hides a method of the class or what
            it computes.
    """
    checked(dict(said), _Keys, RULE, ModelError, REMEDY)
    renamed = getattr(config_class, "attribute_map", {})
    for key in said:
        hides = key.startswith("__") or key in ("attribute_map", "sub_configs")
        there = getattr(config_class, renamed.get(key, key), None)
        computed = isinstance(there, property) and there.fset is None
        if hides or computed or callable(there):
            raise ModelError(
                "A key of config.json must be a setting.", f"{key} of {config_class.__name__}", REMEDY
            )


def check_sizes(config: Any, layers: int | None) -> None:
    """Refuses sizes that do not fit together, or the weights, before a model is traced.

    Args:
        config: a transformers ``PretrainedConfig`` of a family of ``families.FLAX``.
        layers: that the names of the tensors count, at most; None: no tensors are there.

    Raises:
        ModelError: naming the keys.
    """
    for rule, received in _misfits(config, layers):
        raise ModelError(rule, received, REMEDY)


def _misfits(config: Any, layers: int | None) -> Iterator[tuple[str, str]]:
    """What does not fit: the rule and what was received."""
    family = flax_of(config.model_type)
    width, positions = "hidden_size", "max_position_embeddings"

    def said(*keys: str) -> str:
        return ", ".join(f"{config.attribute_map.get(key, key)}={getattr(config, key)}" for key in keys)

    for key in family.divisors:
        if getattr(config, width) % getattr(config, key):
            yield "The width of a model must be a multiple of its heads.", said(width, key)
    for key in filter(partial(hasattr, config), family.depths if layers is not None else ()):
        if getattr(config, key) > layers:
            yield "The weights must have every layer of the model.", f"{said(key)}, {layers} in the weights"
    if getattr(config, positions, 0) * getattr(config, width) > family.largest_table:
        yield f"Positions times width must be at most {family.largest_table:,}.", said(positions, width)
    distance, buckets = "relative_attention_max_distance", "relative_attention_num_buckets"
    if hasattr(config, buckets) and getattr(config, distance) <= getattr(config, buckets) // 2:
        yield "The largest relative distance must be above half of the buckets.", said(distance, buckets)
    for key in ("decoder_start_token_id", "forced_bos_token_id") if config.is_encoder_decoder else ():
        token = getattr(config, key)
        if token is not None and not 0 <= token < config.vocab_size:
            yield "A token must be within the vocabulary.", said("vocab_size", key)
