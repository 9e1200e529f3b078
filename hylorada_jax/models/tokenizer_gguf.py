"""The tokenizer of a GGUF file, from its metadata."""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hylorada_jax.errors import ModelError
from hylorada_jax.models.gguf_header import GGUFFile
from hylorada_jax.models.tokenizer_directory import TokenizerFiles, begin_and_end

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
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def read_gguf_tokenizer(gguf: GGUFFile) -> TokenizerFiles:
    """The tokenizer of a GGUF file.

    Args:
        gguf: its header.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it is not a byte-level BPE of a kind that is read, or names a token that it lacks.

    Source: llama.cpp, ``src/llama-vocab.cpp``.
    """
    prefix = "tokenizer.ggml."
    keys = {k.removeprefix(prefix): v for k, v in gguf.metadata.items() if k.startswith(prefix)}
    pre = keys.get("pre")
    if keys.get("model") != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"The tokenizer of a GGUF file must be byte-level BPE of the kind {', '.join(_PRE_TOKENIZERS)}.",
            f"{gguf.path}: tokenizer.ggml.model {keys.get('model')!r}, tokenizer.ggml.pre {pre!r}",
            "Load the original Hugging Face directory, which has tokenizer.json.",
        )
    tokens = keys["tokens"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in keys["merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, keys["token_type"], strict=True))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, k in kinds if k == _CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token, k in kinds if k == _USER_DEFINED])

    roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    ids = {role: keys[f"{key}_token_id"] for key, role in roles.items() if f"{key}_token_id" in keys}
    if beyond := {role: index for role, index in ids.items() if not 0 <= index < len(tokens)}:
        raise ModelError(
            "The special tokens of a GGUF file must be among its tokens.",
            f"{gguf.path}: {beyond}, of {len(tokens)} tokens",
            "Convert or download it again.",
        )
    special = {role: tokens[index] for role, index in ids.items()}
    bos = special.get("bos_token") if keys.get("add_bos_token", pre == "llama-bpe") else None
    eos = special.get("eos_token") if keys.get("add_eos_token", False) else None
    if bos is not None or eos is not None:
        begin_and_end(backend, bos, eos)
    return TokenizerFiles(backend, special, _chat_template(gguf))


def _chat_template(gguf: GGUFFile) -> str | dict[str, str] | None:
    default = gguf.metadata.get("tokenizer.chat_template")
    names = gguf.metadata.get("tokenizer.chat_templates")
    if not names:
        return default
    named = {name: gguf.metadata[f"tokenizer.chat_template.{name}"] for name in names}
    return named if default is None else {"default": default, **named}
