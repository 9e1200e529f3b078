"""The tokenizer of a model directory: tokenizer.json, and what the files beside it change.

tokenizer.json is taken as it stands, as by transformers 4, and by 5 for the class TokenizersBackend; of some
other classes 5 builds the pre-tokenizer anew. Settings beside it that contradict it count as in version 4: 5
leaves them out, but writes them into tokenizer.json, so that files with both are of version 4.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from hylorada_jax.errors import ModelError
from hylorada_jax.models.chat_template import MORE_TEMPLATES, TEMPLATE_NAME
from hylorada_jax.models.families import family_of
from hylorada_jax.models.inside import file_inside, files_inside
from hylorada_jax.models.tokenizer_backend import read_backend, refusing
from hylorada_jax.models.tokenizer_settings import (
    REMEDY,
    AddedTokens,
    Roles,
    SpecialTokensMap,
    Token,
    TokenizerConfig,
    names_token,
    read_settings,
    read_text,
)

# Older formats of a tokenizer, which another library can convert.
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

_ENDOFTEXT = "<|endoftext|>"
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_MARKED = {**_SENTENCEPIECE, "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>"}
_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _ENDOFTEXT)
_BERT = {role: f"[{role.removesuffix('_token').upper()}]" for role in
         ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")}  # fmt: skip
# Special tokens that no file need name, by the tokenizer's class without "Fast".
_DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _SENTENCEPIECE,
    "CodeLlamaTokenizer": _SENTENCEPIECE,
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    },
    "BloomTokenizer": {**_SENTENCEPIECE, "pad_token": "<pad>"},
    "T5Tokenizer": {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"},
    "XGLMTokenizer": _MARKED,
    "BartTokenizer": {**_MARKED, "mask_token": "<mask>"},
    "RobertaTokenizer": {**_MARKED, "mask_token": "<mask>"},
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2,
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _ENDOFTEXT),
    "BertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
}
# The classes that heed add_bos_token and add_eos_token, and add_bos_token where only the other is given.
_ADDING = {
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"), True),
    "GPTNeoXTokenizer": False,
}
# The classes whose byte-level pre-tokenizer puts a space in front only where add_prefix_space says so.
_UNPREFIXED = ("GPT2Tokenizer", "GPTNeoXTokenizer", "RobertaTokenizer", "BartTokenizer")


class TokenizerFiles(NamedTuple):
    """What files say of a tokenizer.

    Attributes:
        backend: the tokenizer of the tokenizers library.
        special_tokens: the text of the special tokens by role.
        chat_template: the template, or the templates by name.
        cleans_up: spaces before punctuation go when ids are decoded.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | dict[str, str] | None
    cleans_up: bool = False


def read_tokenizer(path: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer of a model directory.

    Args:
        path: of the directory.
        config: the content of its config.json.

    Returns:
        The tokenizer, which cuts and pads nothing.

    Raises:
        ModelError: there is no tokenizer.json, or one of the files cannot be read.

    Source: transformers 4.57 and 5.24, ``PreTrainedTokenizerBase._from_pretrained`` and the fast classes.
    """
    if (file := file_inside(path, "tokenizer.json")) is None:
        slow = [f for f in _SLOW_FILES if (path / f).is_file()]
        raise ModelError(
            "A tokenizer must be saved as tokenizer.json.",
            f"{path}: {', '.join(slow) or 'no tokenizer'}",
            "Convert once with transformers: `AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`.",
        )
    with refusing(path):
        return _read(path, file, config)


def _read(path: Path, file: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    backend = read_backend(file)
    settings = read_settings(path, "tokenizer_config.json", TokenizerConfig)
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    kind = str(named or family_of(config.get("model_type")).tokenizer or "").removesuffix("Fast")
    prefix = settings.get("add_prefix_space", False if kind in _UNPREFIXED else None)
    if prefix is not None and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = prefix
    elif prefix is False and kind in _ADDING:
        backend = read_backend(file, prefix=False)
    settings, added = _tokens(path, settings, backend)
    # A default that the vocabulary lacks is not added to it: the model's embedding has no row for it.
    for role, text in _DEFAULTS.get(kind, {}).items():
        if role not in settings and backend.token_to_id(text) is not None:
            settings[role] = text
    roles = dict.fromkeys([*Roles.__struct_fields__, *settings])  # the order in which new ones get their ids
    special = {role: settings[role] for role in roles if names_token(role, settings.get(role))}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    if isinstance(more, dict):
        special, more = {**special, **more}, ()
    _add(backend, added, special, [*map(_as_token, more)])
    texts = {role: str(_as_token(token).content) for role, token in special.items()}
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))

    flags = {end: settings.get(f"add_{end}_token") for end in ("bos", "eos")}
    if kind in _ADDING and any(flag is not None for flag in flags.values()):
        flags["bos"] = _ADDING[kind] if flags["bos"] is None else flags["bos"]
        begin_and_end(backend, *(texts.get(f"{end}_token") if flag else None for end, flag in flags.items()))
    # Of byte-pair encodings transformers 5 leaves the spaces: there they are parts of tokens.
    wanted, bpe = settings.get("clean_up_tokenization_spaces"), isinstance(backend.model, models.BPE)
    return TokenizerFiles(backend, texts, _chat_template(path, settings), bool(wanted) and not bpe)


def _tokens(
    path: Path, settings: dict[str, Any], backend: tokenizers.Tokenizer
) -> tuple[dict[str, Any], list[AddedToken]]:
    """The settings, and the tokens that the files beside tokenizer.json add, by id."""
    if "added_tokens_decoder" in settings:
        listed = {
            int(index): _as_token(token, special=False)
            for index, token in settings["added_tokens_decoder"].items()
        }
    else:
        # Files of an older form, in which special_tokens_map.json is the last word.
        theirs = read_settings(path, "special_tokens_map.json", SpecialTokensMap)
        merged = [
            token for each in (settings, theirs) for token in each.get("additional_special_tokens") or ()
        ]
        settings = {**settings, **theirs, "additional_special_tokens": merged}
        special = {_as_token(token).content for role, token in settings.items() if names_token(role, token)}
        special |= {_as_token(token).content for token in merged}
        listed = {
            int(index): AddedToken(text, normalized=text not in special, special=text in special)
            for text, index in read_settings(path, "added_tokens.json", AddedTokens).items()
        }
        listed |= backend.get_added_tokens_decoder()
    return settings, [listed[index] for index in sorted(listed)]


def _add(
    backend: tokenizers.Tokenizer,
    listed: list[AddedToken],
    special: Mapping[str, Any],
    more: list[AddedToken],
) -> None:
    """Adds what tokenizer.json lacks, or has with other properties; new tokens get the next ids."""
    there = backend.get_added_tokens_decoder().values()
    known = {repr(token) for token in there}
    new = {token.content: token for token in listed if repr(token) not in known}
    known = {token.content for token in there} | new.keys()
    named = [*map(_as_token, special.values())]
    for token in [*named, *more]:
        if token.content not in known:
            new.setdefault(token.content, token)
    for token in named:
        if token.content in new:
            new[token.content].special = True
    backend.add_tokens([*new.values()])


def begin_and_end(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Lets the tokenizer begin every text with one token and end it with another.

    Args:
        backend: is changed.
        bos: the text of the first token; None: none.
        eos: of the last.

    Raises:
        ModelError: it cannot be one of them.
    """
    ends = [token for token in (bos, eos) if token is not None]
    single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)]
    if wrong := [token for token, index in ids if index is None or token.startswith("$") or ":" in token]:
        raise ModelError(
            "A token that begins or ends every text must be in the vocabulary, without '$' in front and ':'.",
            repr(wrong),
            REMEDY,
        )
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _as_token(token: Any, special: bool = True) -> AddedToken:
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, special=special)
    properties = {key: token[key] for key in Token.__struct_fields__ if key in token}
    return AddedToken(**{"special": special} | properties)


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Of files of their own, where there are any, else of tokenizer_config.json: one, or several by name."""
    files = files_inside(path, TEMPLATE_NAME, MORE_TEMPLATES)
    if files:
        found = {"default" if file.parent == path else file.stem: read_text(file) for file in files}
        return found["default"] if found.keys() == {"default"} else found
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template
