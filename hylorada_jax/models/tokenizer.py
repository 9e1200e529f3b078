"""Text to token ids and back, from a model directory or from the metadata of a GGUF file."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from hylorada_jax.errors import DataError, ModelError
from hylorada_jax.models.gguf_header import GGUFFile
from hylorada_jax.models.source import find_source
from hylorada_jax.text import well_formed

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

# Older formats of a tokenizer, which another library can convert.
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a base model; use `load_tokenizer`.

    Special tokens that are written out in a text, such as <|im_start|>, become their ids, as in transformers.

    Args:
        backend: the tokenizer of the tokenizers library.
        special_tokens: the text of the special tokens by role: bos_token, eos_token, pad_token …
        chat_template: the jinja2 template of the model's chat format, if it has one.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills a row."""
        return self._special_id("pad_token")

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: also add what the model's own template adds, such as a first bos token.

        Returns:
            The ids.
        """
        return self.backend.encode(well_formed(text), add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and for each the characters [start, end) that it stands for.

        Args:
            text: any text.

        Returns:
            The ids and the offsets. Tokens that share one character (its bytes) share its offsets.
        """
        encoding = self.backend.encode(well_formed(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, exactly as it was encoded.

        Args:
            ids: token ids.
            skip_special_tokens: leave special tokens out.

        Returns:
            The text; bytes that form no character come out as U+FFFD.
        """
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: [{"role": "user", "content": "…"}, …].
            add_generation_prompt: end with the opening of the assistant's turn.

        Returns:
            The text, special tokens written out, to be encoded without further special tokens.

        Raises:
            DataError: the model has no chat template, or the template refuses the messages.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise DataError(
                "A conversation needs a model with a chat template.",
                "a tokenizer without one",
                "Use an instruction-tuned model, or give plain text.",
            )

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The sandbox, because the template is code that comes with the model.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except jinja2.TemplateError as error:
            raise DataError(
                "The messages must be what the model's chat template accepts.",
                f"{[message.get('role') for message in messages]}: {error}",
                "Check the roles, their order, and that each message has a content.",
            ) from error


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a base model.

    Args:
        name: as for `find_source`; a Hub name fetches no weights.

    Returns:
        The tokenizer.

    Raises:
        ModelError: the model is not found, or its tokenizer is of a kind that is not read.

    Example:
        >>> tokenizer = load_tokenizer("smollm2-135m")
        >>> tokenizer.decode(tokenizer.encode("Grüße, 42!"))
        'Grüße, 42!'
    """
    source = find_source(name, config_only=True)
    return _from_gguf(source.gguf) if source.gguf else _from_directory(source.path)


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        slow = [f for f in _SLOW_FILES if (path / f).is_file()]
        raise ModelError(
            "A tokenizer must be saved as tokenizer.json.",
            f"{path}: {', '.join(slow) or 'no tokenizer'}",
            "Convert once with transformers: AutoTokenizer.from_pretrained(dir).save_pretrained(dir)",
        )
    try:
        backend = tokenizers.Tokenizer.from_buffer(file.read_bytes())
        settings = {**_json(path, "special_tokens_map.json"), **_json(path, "tokenizer_config.json")}
    except Exception as error:  # tokenizers raises the bare class
        raise ModelError(
            "The tokenizer's files must be complete JSON.", f"{path}: {error}", "Download them again."
        ) from error
    # What was set when the tokenizer was saved would cut long texts in silence.
    backend.no_truncation()
    backend.no_padding()
    special = {}
    for role, token in settings.items():
        text = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(text, str):
            special[role] = text
    return Tokenizer(backend, special, _chat_template(path, settings))


def _json(path: Path, name: str) -> dict[str, Any]:
    return json.loads((path / name).read_text("utf-8")) if (path / name).is_file() else {}


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _from_gguf(gguf: GGUFFile) -> Tokenizer:
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
    special = {role: tokens[index] for role, index in ids.items()}
    if keys.get("add_bos_token", pre == "llama-bpe"):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids["bos_token"])]
        )
    return Tokenizer(backend, special, gguf.metadata.get("tokenizer.chat_template"))
