"""The tokenizer of a GGUF file, from its metadata."""

from collections import Counter
from typing import Annotated, Any

import msgspec
import numpy as np
import tokenizers
from msgspec import Meta
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.gguf import special_ids
from hylorada_jax.models.gguf_header import REMEDY, GGUFFile
from hylorada_jax.models.tokenizer_backend import refusing
from hylorada_jax.models.tokenizer_directory import TokenizerFiles, begin_and_end
from hylorada_jax.models.tokenizer_settings import TokenText

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# tokenizer.ggml.pre → how text is cut before the merges, as llama.cpp's `llama-vocab.cpp` defines the name.
_PRE_TOKENIZERS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_CONTRACTIONS + _WORDS + r"\p{N}" + _REST), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
_TEMPLATE, _TYPES = "tokenizer.chat_template", "tokenizer.ggml.token_type"
_CONTROL, _USER_DEFINED = 3, 4  # of the types
# transformers' names of the special tokens.
_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


class _Keys(
    msgspec.Struct,
    rename={
        **{name: f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "add_bos_token", "add_eos_token")},
        "template": _TEMPLATE,
        "templates": "tokenizer.chat_templates",
    },
    kw_only=True,
):
    """The metadata of a tokenizer, but its arrays of numbers and the ids of special tokens."""

    tokens: Annotated[list[TokenText], Meta(min_length=1)]
    merges: list[str]
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    template: str | None = None
    templates: list[str] = []


def read_gguf_tokenizer(gguf: GGUFFile) -> TokenizerFiles:
    """The tokenizer of a GGUF file.

    Args:
        gguf: its header.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it is not a byte-level BPE of a kind that is read, or its tokens, their types, its merges
            and its special tokens do not fit together.

    Source: llama.cpp, ``src/llama-vocab.cpp``.
    """
    model, pre = (gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if not (isinstance(model, str) and model == "gpt2" and isinstance(pre, str) and pre in _PRE_TOKENIZERS):
        raise ModelError(
            f"The tokenizer of a GGUF file must be byte-level BPE of the kind {', '.join(_PRE_TOKENIZERS)}.",
            f"{gguf.path}: tokenizer.ggml.model {model!r}, tokenizer.ggml.pre {pre!r}",
            "Load the original Hugging Face directory, which has tokenizer.json.",
        )
    keys = _keys(gguf)
    with refusing(gguf.path):
        backend = _backend(keys, gguf.metadata[_TYPES].tolist(), pre)
    special = {
        _ROLES[role]: keys.tokens[index] for role, index in special_ids(gguf).items() if role in _ROLES
    }
    adds_bos = pre == "llama-bpe" if keys.add_bos_token is None else keys.add_bos_token
    bos = special.get("bos_token") if adds_bos else None
    eos = special.get("eos_token") if keys.add_eos_token else None
    if bos is not None or eos is not None:
        begin_and_end(backend, bos, eos)
    return TokenizerFiles(backend, special, _chat_template(gguf, keys))


def _keys(gguf: GGUFFile) -> _Keys:
    """The metadata of the tokenizer, its types and lengths checked."""
    rule = f"The tokenizer of a GGUF file must have its keys, each of its type: {gguf.path}."
    keys = checked(gguf.metadata, _Keys, rule, ModelError, REMEDY)
    if fault := _fault(keys, gguf.metadata.get(_TYPES)):
        raise ModelError(
            "The tokenizer of a GGUF file must have tokens of one type each, and merges of two.",
            f"{gguf.path}: {fault}",
            REMEDY,
        )
    return keys


def _fault(keys: _Keys, types: Any) -> str:
    """What lists of the right types still get wrong, in words; of the merges' tokens the library says it."""
    if len(set(keys.tokens)) < len(keys.tokens):
        return f"the token {Counter(keys.tokens).most_common(1)[0][0]!r} occurs twice"
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        return f"{_TYPES} is not an array of integers"
    if len(types) != len(keys.tokens):
        return f"{len(keys.tokens):,} tokens, and {len(types):,} types in {_TYPES}"
    wrong = [merge for merge in keys.merges if merge.count(" ") != 1]
    return f"{wrong[0]!r} is not a merge" if wrong else ""


def _backend(keys: _Keys, types: list[int], pre: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(keys.tokens)},
            merges=[tuple(merge.split(" ")) for merge in keys.merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(keys.tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, k in kinds if k == _CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token, k in kinds if k == _USER_DEFINED])
    return backend


def _chat_template(gguf: GGUFFile, keys: _Keys) -> str | dict[str, str] | None:
    if not keys.templates:
        return keys.template
    named = {name: gguf.metadata.get(f"{_TEMPLATE}.{name}") for name in keys.templates}
    rule = f"Every chat template of a GGUF file must be a text: {gguf.path}, {_TEMPLATE}.*."
    templates = checked(named, dict[str, str], rule, ModelError, REMEDY)
    return templates if keys.template is None else {"default": keys.template, **templates}
