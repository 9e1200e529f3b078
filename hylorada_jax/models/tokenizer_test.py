import json
import string
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from hylorada_jax.errors import DataError, ModelError
from hylorada_jax.models.gguf_header import GGUFFile
from hylorada_jax.models.gguf_test import KEYS, tensors, write_gguf
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.models.tokenizer_files import write_tokenizer as write_files
from hylorada_jax.models.tokenizer_gguf import read_gguf_tokenizer
from hylorada_jax.text import well_formed

TEXTS = [
    "def f(x1, y=12):\r\n\treturn  x1 ** 2  # it's 100%\n\n\n    done",
    "Grüße, 3.14159 ½ Ⅷ ٣٤٥  12 你好，世界！ I'll we'VE",
    "<s>begin</s> <tool>",
    "🤦🏽‍♂️ e\u0301 \x00 \ufeff",
    "",
]

# The patterns, copied from llama.cpp's llama-vocab.cpp: applied one after the other to the pieces so far.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "qwen2": [LLAMA3.replace("{1,3}", "")]}


def pieces_of(text: str, patterns: list[str]) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        cut: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


def bpe(piece: str, ranks: dict[tuple[str, str], int], letters: dict[int, str]) -> list[str]:
    """Byte-pair encoding as its paper has it: merge the best-ranked pair until there is none."""
    parts = [letters[byte] for byte in piece.encode()]
    while True:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts))]
        if not pairs or min(pairs)[0] == len(ranks):
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes, read off the tokenizers library byte by byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}


@pytest.fixture(scope="module")
def trained() -> dict:
    """A small byte-level BPE, trained without cutting at digits so that merges across them exist."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<s>", "</s>", "<pad>", "<tool>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" 12 123 100  12", string.ascii_letters, *TEXTS] * 3, trainer)
    saved = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in saved["merges"]]}


def write_tokenizer(tmp_path, trained, pre="smollm", model="gpt2", **more):
    types = [3, 3, 3, 4] + [1] * (len(trained["tokens"]) - 4)
    metadata = {"model": model, "pre": pre, "tokens": trained["tokens"], "merges": trained["merges"]}
    metadata |= {"token_type": types, "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2} | more
    extra = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    extra["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if messages[0].role == 'odd' %}{{ raise_exception('no odd role') }}{% endif %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return write_gguf(tmp_path / "t.gguf", "llama", KEYS, tensors(), extra=extra)


@pytest.mark.parametrize("pre", PATTERNS)
def test_encoding_is_byte_pair_encoding_of_the_pieces_that_the_kind_defines(tmp_path, trained, pre):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained, pre))
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(trained["merges"])}
    letters = byte_letters()
    seen = set()
    for text in TEXTS:
        if "<s>" in text or (pre == "qwen2" and "\u0301" in text):  # special tokens; NFC, tested below
            continue
        expected = [part for piece in pieces_of(text, PATTERNS[pre]) for part in bpe(piece, ranks, letters)]
        ids = tokenizer.encode(text)
        assert [trained["tokens"][i] for i in ids] == expected
        assert tokenizer.decode(ids) == text
        seen.update(expected)
    # The kinds differ where it matters: only llama-bpe may join two digits.
    assert any(len(token) > 1 and token.isdigit() for token in seen) == (pre == "llama-bpe")


def test_special_tokens(tmp_path, trained):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.vocab_size == len(trained["tokens"])
    ids = tokenizer.encode("<s>begin</s> <tool>")
    assert (ids[0], ids[-1]) == (0, 3)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>begin</s> <tool>"
    assert tokenizer.decode(ids) == "begin <tool>"  # <tool> is user-defined: a word of its own, not special


def test_the_first_token_is_added_where_the_model_wants_it(tmp_path, trained):
    plain = load_tokenizer(write_tokenizer(tmp_path, trained)).encode("a")
    for pre, more, added in (
        ("smollm", {}, False),
        ("smollm", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, True),
    ):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained, pre, **more))
        assert tokenizer.encode("a") == plain
        assert tokenizer.encode_prompt("a").ids == [0] * added + plain
        assert tokenizer.encode_documents(["a"])[0].ids == [0] * added + plain + [1]


TOKENS, MERGES, TYPES = (f"tokenizer.ggml.{key}" for key in ("tokens", "merges", "token_type"))
SMALL = {TOKENS: ["<s>", "a", "b", "ab"], MERGES: ["a b"], TYPES: np.array([3, 1, 1, 1])}
# What the error says: the metadata that say it, beside those of a small tokenizer; None: it is not there.
WRONG: dict[str, dict[str, Any]] = {
    "missing required field `tokenizer.ggml.tokens`": {TOKENS: None},
    "missing required field `tokenizer.ggml.merges`": {MERGES: None},
    "token_type is not an array of integers": {TYPES: None},
    r"tokenizer.ggml.tokens: 'abc' \(Expected `array`": {TOKENS: "abc"},
    r"tokenizer.ggml.tokens: array\(\[0, 1, 2, 3\]\) \(Expected": {TOKENS: np.arange(4)},
    r"tokenizer.ggml.tokens: \[\] \(Expected `array` of length >= 1": {TOKENS: []},
    "the token 'a' occurs twice": {TOKENS: ["<s>", "a", "b", "a"]},
    "of length <= 4096": {TOKENS: ["<s>", "a", "b", "c" * 4097]},
    r"tokenizer.ggml.merges: 7 \(Expected `array`": {MERGES: 7},
    "'ab' is not a merge": {MERGES: ["a b", "ab"]},
    "'a b a' is not a merge": {MERGES: ["a b a"]},
    "Token `c` out of vocabulary": {MERGES: ["a c"]},
    "Token `ba` out of vocabulary": {MERGES: ["b a"]},
    "Token `` out of vocabulary": {MERGES: [" a"]},
    "4 tokens, and 3 types": {TYPES: np.array([1, 1, 1])},
    "not an array of integers": {TYPES: np.ones(4, np.float32)},
    "token_type is not an array": {TYPES: ["1", "1", "1", "1"]},
    r"'tokenizer.ggml.eos_token_id': 4}, of 4 tokens": {"tokenizer.ggml.eos_token_id": 4},
    r"'tokenizer.ggml.bos_token_id': -1}": {"tokenizer.ggml.bos_token_id": -1},
    r"'tokenizer.ggml.padding_token_id': 0.0}": {"tokenizer.ggml.padding_token_id": 0.0},
    r"'tokenizer.ggml.unknown_token_id': \[0\]}": {"tokenizer.ggml.unknown_token_id": [0]},
    r"add_bos_token: 1 \(Expected `bool": {"tokenizer.ggml.add_bos_token": 1},
    r"add_eos_token: 'no' \(Expected `bool": {"tokenizer.ggml.add_eos_token": "no"},
    r"chat_template: 3 \(Expected `str": {"tokenizer.chat_template": 3},
    r"chat_templates: 'rag' \(Expected `array": {"tokenizer.chat_templates": "rag"},
    "Every chat template of a GGUF file must be a text": {"tokenizer.chat_templates": ["rag"]},
    "tokenizer.ggml.model None": {"tokenizer.ggml.model": None},
    "tokenizer.ggml.model array": {"tokenizer.ggml.model": np.arange(2)},
    "tokenizer.ggml.pre 'deepseek-llm'": {"tokenizer.ggml.pre": "deepseek-llm"},
    r"tokenizer.ggml.pre \['smollm'\]": {"tokenizer.ggml.pre": ["smollm"]},
    "must be in the vocabulary, without": {TOKENS: ["<s>", "a", "b:", "ab:"], MERGES: ["a b:"],
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.add_bos_token": True},
}  # fmt: skip


@pytest.mark.parametrize("said", ["", *WRONG])
def test_metadata_that_do_not_fit_together_are_refused(said):
    whole = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"} | SMALL | WRONG.get(said, {})
    metadata = {key: value for key, value in whole.items() if value is not None}
    header = GGUFFile(Path("m.gguf"), metadata, {})
    if said:
        with pytest.raises(ModelError, match=said):
            read_gguf_tokenizer(header)
    else:
        assert read_gguf_tokenizer(header).backend.encode("<s>ab").ids == [0, 3]


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_long_text_of_one_character_takes_its_time_and_no_more(pre, tmp_path, trained):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained, pre))
    for character in ("a", "\0", " ", "\ud800", "1", "\n"):
        start = time.process_time()
        ids = tokenizer.encode(character * 10**5)
        assert tokenizer.decode(ids) == well_formed(character) * 10**5
        assert time.process_time() - start < 2


def test_qwen2_normalises_to_composed_characters(tmp_path, trained):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained, "qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_offsets_are_characters_of_the_text(tmp_path, trained):
    text = "Grüße 42 done 你好"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained))
    ids, offsets = tokenizer.encode_with_offsets(text)
    whole = [(tokenizer.decode([i]), text[slice(*at)]) for i, at in zip(ids, offsets, strict=True)]
    assert [pair for pair in whole if pair[0] != pair[1] and "\ufffd" not in pair[0]] == []
    assert any("\ufffd" in token for token, _ in whole)  # bytes of 你 on their own
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))


def test_chat_template(tmp_path, trained):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<s>[user] hi[assistant]"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "<s>[user] hi"
    with pytest.raises(DataError, match="no odd role"):
        tokenizer.apply_chat_template([{"role": "odd", "content": ""}])


def test_a_template_is_sandboxed(tmp_path, trained):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, trained))
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="unsafe"):
        replace(tokenizer, chat_template=attack).apply_chat_template([{"role": "user", "content": ""}])
    with pytest.raises(DataError, match="chat template"):
        replace(tokenizer, chat_template=None).apply_chat_template([])


def test_what_is_written_out_is_the_same_tokenizer(tmp_path, trained):
    more = {"eot_token_id": 3, "add_bos_token": True}
    ours = load_tokenizer(write_tokenizer(tmp_path, trained, **more))
    assert isinstance(ours.chat_template, str)
    templates = {"default": ours.chat_template, "rag": "r"}
    place = tmp_path / "written"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama"}')
    write_files(replace(ours, chat_template=templates), place)
    again = load_tokenizer(place)
    assert (again.special_tokens, again.chat_template) == (ours.special_tokens, templates)
    assert again.end_token_ids == ours.end_token_ids == (1, 3)
    for text in TEXTS:
        assert again.encode_prompt(text) == ours.encode_prompt(text)


def test_other_kinds_are_refused_by_name(tmp_path, trained):
    with pytest.raises(ModelError, match=r"'llama', tokenizer\.ggml\.pre 'default'"):
        load_tokenizer(write_tokenizer(tmp_path, trained, "default", "llama"))


def test_a_directory_without_tokenizer_json(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"tokenizer\.model[\s\S]*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="complete JSON"):
        load_tokenizer(tmp_path)
