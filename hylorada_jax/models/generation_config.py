"""The settings of generation that a model comes with: generation_config.json, or a GGUF file's metadata."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked, read_json
from hylorada_jax.models.bounds import Token, Tokens
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.inside import file_inside
from hylorada_jax.models.source import Source, find_source

FILE = "generation_config.json"
_RULE = f"{FILE} must give each setting a value of its type and within its bounds."
_REMEDY = f"Correct {FILE}, or download it again."


class _Settings(Struct):
    """The settings that are heeded; a null counts as an absent one."""

    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=2**20)] | None = None


class Constraints(Struct, frozen=True):
    """The settings that forbid tokens, or force one; only with Hugging Face's models are they heeded."""

    min_length: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    forced_bos_token_id: Token | None = None
    forced_eos_token_id: Tokens = None
    suppress_tokens: list[Token] | None = None
    begin_suppress_tokens: list[Token] | None = None


_OF_TOKENS = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
OFF = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
"""The values that change no logits."""
# Those that have an effect only where tokens are sampled.
FILTERS = ("top_k", "top_p", "min_p")
_OF_SAMPLING = ("temperature", *FILTERS)
# What transformers takes where a file that asks for sampling does not say.
_SAMPLED = {"temperature": 1.0, "top_k": 50}
# Settings that change the answers and are not heeded, with the values that mean "off".
_UNHEEDED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),  # transformers' own, which counts where a file says nothing too
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({},),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
# llama.cpp's converter writes them from generation_config.json.
_GGUF = "general.sampling."
_OF_GGUF = {
    f"{_GGUF}temp": "temperature",
    **{f"{_GGUF}{name}": name for name in ("top_k", "top_p", "min_p")},
    f"{_GGUF}penalty_repeat": "repetition_penalty",
}


def read_generation_config(source: Source) -> dict[str, Any]:
    """The content of a directory's generation_config.json; nothing where it has none.

    Raises:
        ModelError: it is not a JSON object, is too large, or lies elsewhere.
    """
    if source.gguf or (file := file_inside(source.path, FILE)) is None:
        return {}
    return read_json(file, f"{FILE} must be a JSON object.", ModelError)


def constraints(said: Mapping[str, Any], vocabulary: int, where: object) -> Constraints:
    """The settings that forbid tokens, or force one.

    Args:
        said: settings of generation, among others perhaps.
        vocabulary: all tokens must be below it.
        where: the model, for an error.

    Raises:
        ModelError: one is of another type or out of bounds, or names a token outside the vocabulary.

    Example:
        >>> constraints({"min_length": 5, "num_beams": 4}, 50, "bart").min_length
        5
    """
    rule = "The settings of generation must have values of their types and within their bounds."
    remedy = f"Correct {FILE} or config.json."
    found = checked(dict(said), Constraints, rule, ModelError, remedy, where)
    for name in _OF_TOKENS:
        value = getattr(found, name)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if outside := [token for token in tokens if token >= vocabulary]:
            received = f"{where}: {name} {outside[0]} in a vocabulary of {vocabulary}"
            raise ModelError("A token must be within the vocabulary.", received, remedy)
    return found


def generation_defaults(name: str | Path) -> dict[str, Any]:
    """The settings with which a model's makers generate.

    Args:
        name: as for :func:`hylorada_jax.load_model`; a Hub name fetches no weights.

    Returns:
        Those of temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens to pass to
        ``generate``; no sampling settings if the model does not sample or has no file.

    Raises:
        ModelError: the model is not found, or a setting is of another type or out of bounds.

    Warns:
        UserWarning: names settings that would change the answers, and that are not heeded.

    Example:
        >>> generation_defaults("smollm2-135m")
        {}

    Source: transformers 5.24, ``GenerationConfig`` and ``_get_logits_processor``; of GGUF files llama.cpp's
    ``gguf-py/gguf/constants.py``.
    """
    source = find_source(name, config_only=True)
    if source.gguf is None:
        ours = source.config.get("model_type") in DECODERS
        # Without the file, the version of transformers that has Flax classes reads config.json.
        said = read_generation_config(source) or ({} if ours else source.config)
        heeded = set() if ours else {*Constraints.__struct_fields__}
        if said.get("max_new_tokens") is not None:  # which takes precedence
            heeded.add("max_length")
        unheeded = [
            key
            for key, off in _UNHEEDED.items()
            if key not in heeded and said.get(key) is not None and said[key] not in off
        ]
    else:
        named = {key: value for key, value in source.gguf.metadata.items() if key.startswith(_GGUF)}
        said = {_OF_GGUF[key]: value for key, value in named.items() if key in _OF_GGUF}
        said["do_sample"] = "temperature" in said
        unheeded = [key for key in named if key not in _OF_GGUF]
    found = checked(said, _Settings, _RULE, ModelError, _REMEDY, source.path)
    if unheeded:
        warnings.warn(
            f"{source.path}: settings of generation that are not heeded: {', '.join(unheeded)}", stacklevel=2
        )
    given = {key: getattr(found, key) for key in _Settings.__struct_fields__[1:]}
    if found.do_sample:
        given |= {key: value for key, value in _SAMPLED.items() if given[key] is None}
    else:
        given |= dict.fromkeys(_OF_SAMPLING)
    return {key: value for key, value in given.items() if value is not None and value != OFF.get(key)}


def as_generation_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a generation_config.json that says what :func:`generation_defaults` found elsewhere.

    Args:
        settings: from :func:`generation_defaults`.

    Example:
        >>> as_generation_config({"temperature": 0.6, "top_p": 0.9})
        {'do_sample': True, 'top_k': 0, 'temperature': 0.6, 'top_p': 0.9}
    """
    if settings.get("temperature"):
        return {"do_sample": True, "top_k": 0, **settings}  # without a top_k, a reader takes one of its own
    return {key: value for key, value in settings.items() if key not in _OF_SAMPLING}
