"""What tells one base model from another: its architecture, its layers' shapes, and a hash of its config.

Imports neither jax nor torch: both packages name their bases here, and name the same base alike.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.surgery.targets import is_head

# The fields of DecoderConfig, and of its RopeScaling, that config_sha256 has always covered. They are file
# format: with one more, no adapter that was ever saved would know its base.
HASHED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act",
    "rms_norm_eps", "rope_theta", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm",
    "sliding_window", "sliding_layers",
)  # fmt: skip
HASHED_ROPE = (
    "rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "truncate", "attention_factor",
)  # fmt: skip
# A later field enters the hash where it is not at its default, under which a model computes what it did
# before there was the field; these never do, for they change no number of a trained model's evaluation, or
# follow from model_type.
UNHASHED = ("initializer_range", "eos_token_ids", "embedding_scale_rounded")

# The same in transformers' configs: parts of names.
_IDLE = ("initializer", "dropout", "pdrop", "use_cache", "token_id", "summary_", "gradient_checkpointing")
# What transformers 4.57 keeps in every config and no family computes with. Written out, for version 5 moved
# half of it elsewhere, and a file that was saved under one version is read under the other.
_GENERAL = {
    "_name_or_path", "add_cross_attention", "architectures", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16",
}  # fmt: skip
# Families whose config says in version 4.57 alone how positions enter; version 5 knows one way.
_ABSOLUTE = ("albert", "bert", "camembert", "electra", "roberta", "roberta-prelayernorm", "xlm-roberta")


def base_identity(
    name: str | None, config: Any, linears: Iterable[tuple[str, int, int]]
) -> dict[str, str | None]:
    """What an adapter file says of the model it was trained on.

    Args:
        name: what the user loaded the model by; for people, and as the default of commands.
        config: the model's: a DecoderConfig, one of transformers', or None.
        linears: (name, d_out, d_in) of every linear layer; output heads are left out.

    Returns:
        {"name", "model_type", "layers_sha256", "config_sha256"}.

    Example:
        >>> identity = base_identity("tiny", None, [("fc", 4, 3), ("lm_head", 9, 4)])
        >>> identity == base_identity("tiny", None, [("fc", 4, 3)])
        True
    """
    settings = _settings(config)
    return {
        "name": name,
        "model_type": settings.get("model_type"),
        "layers_sha256": _digest(sorted([n, o, i] for n, o, i in linears if not is_head(n))),
        "config_sha256": _digest(settings),
    }


def _settings(config: Any) -> dict[str, Any]:
    """What of a config decides the numbers, alike whether our decoder or transformers has read it."""
    if config is None:
        return {}
    if isinstance(config, DecoderConfig):
        rope = _covered(config.rope_scaling, HASHED_ROPE)
        return _stated(_covered(config, HASHED, ("rope_scaling", *UNHASHED)) | {"rope_scaling": rope})
    settings = config.to_dict()
    try:
        return _settings(DecoderConfig.from_hf(settings))
    except ModelError:  # not of our decoder's families
        settings = _stated(_as_of_4_57(_stated(settings)))
    return {
        key: value
        for key, value in settings.items()
        if key not in _GENERAL and not any(idle in key for idle in _IDLE)
    }


def _covered(part: Any, hashed: Collection[str], unhashed: Collection[str] = ()) -> dict[str, Any]:
    """The fields that have always been covered, and of the later ones those that are on."""
    later = [field for field in dataclasses.fields(part) if field.name not in (*hashed, *unhashed)]
    on = [field.name for field in later if getattr(part, field.name) != field.default]
    return {name: getattr(part, name) for name in (*hashed, *on)}


def _stated(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _as_of_4_57(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of transformers 5 under the names and in the layout that 4.57 has; its own as they are."""
    said = dict(settings)
    if rope := said.pop("rope_parameters", None):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        said |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        said |= {"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {}
    if "encoder_layers" in said:
        said.setdefault("num_hidden_layers", said["encoder_layers"])
    if "scale_decoder_outputs" in said:  # of T5, where version 4 reads it off tie_word_embeddings
        said["tie_word_embeddings"] = said.pop("scale_decoder_outputs")
    if said.get("model_type") == "mt5":  # never scaled; its files and 4.57 say False, version 5 True
        said["tie_word_embeddings"] = False
    if said.get("model_type") in _ABSOLUTE:
        said.setdefault("position_embedding_type", "absolute")
    return said


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_rounded(value), sort_keys=True).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    """Floats to six digits: a GGUF file keeps 1e-05 in float32, config.json in decimals."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
