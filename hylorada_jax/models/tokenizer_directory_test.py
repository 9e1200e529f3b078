"""Tokenizer files as a stranger may write them: each ends in our error or in a tokenizer that works."""

import base64
import json
import struct
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.models.tokenizer import Tokenizer, load_tokenizer
from hylorada_jax.models.tokenizer_backend import _GROWTH, _MAX_GROWTH

MODEL: dict[str, Any] = {
    "type": "BPE",
    "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4},
    "merges": [["a", "b"]],
}
SMALL: dict[str, Any] = {"version": "1.0", "model": MODEL}
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
TEXTS = ["ab" * 20, "a" * 60 + "!", "é \ud800\0<s>"]


def write(path: Path, tokenizer: Any = SMALL, config: Any = ENDS, **others: Any) -> Path:
    """A model directory; what is not a bytes is written as JSON."""
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "config.json": {}, **others}
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def used(path: Path) -> Tokenizer:
    """The tokenizer, after each of its methods has seen a text, within a second."""
    start = time.process_time()
    try:
        tokenizer = load_tokenizer(path)
        for text in TEXTS:
            tokenizer.encode(text)
            tokenizer.encode_prompt(text)
            tokenizer.encode_with_offsets(text)
        tokenizer.encode_documents(TEXTS)
        tokenizer.decode([0, 1, 2, 2, 99])
        tokenizer.decode([0])
        return tokenizer
    finally:
        assert time.process_time() - start < 1


def step(**given: Any) -> dict[str, Any]:
    """tokenizer.json with one part or more."""
    return SMALL | given


def model(**given: Any) -> dict[str, Any]:
    return step(model=MODEL | given)


def split(pattern: dict[str, str]) -> dict[str, Any]:
    return step(pre_tokenizer={"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})


def charsmap(content: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    steps = [{"type": "Precompiled", "precompiled_charsmap": encoded}]
    return step(normalizer={"type": "Sequence", "normalizers": steps})


def template(*single: dict[str, Any], **special: Any) -> dict[str, Any]:
    return step(
        post_processor={
            "type": "TemplateProcessing",
            "single": list(single),
            "pair": [],
            "special_tokens": special,
        }
    )


def longer(kind: str, plural: str, one: dict[str, Any], times: int) -> dict[str, Any]:
    return step(**{kind: {"type": "Sequence", plural: [one] * times}})


TOKEN = {
    "id": 5,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
PIECE = {"SpecialToken": {"id": "[X]", "type_id": 0}}
WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
STRIP = {"type": "Strip", "content": "a", "start": 10**18, "stop": 10**18}

WORDS = {"type": "WordPiece", "unk_token": "b", "continuing_subword_prefix": "##", "vocab": {"b": 0, "a": 1}}

PREPEND = {"type": "Prepend", "prepend": "▁"}
NOTHING = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}  # between all letters
LETTERS = {"type": "Replace", "pattern": {"Regex": "."}, "content": "\ufdfa"}
NFKC = {"type": "NFKC"}


def sequence(plural: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", plural: list(steps)}


def sentencepiece(longest: int) -> dict[str, Any]:
    """A table that puts this many bytes in the place of "a": of one path through a double array."""
    index = [0] * 1024
    index[0] = 256 << 10  # the root's children are at 256 ^ letter
    index[256 ^ ord("a")] = (
        512 << 10 | 1 << 8 | ord("a")
    )  # a word ends here; its value is at this place ^ 512
    index[256 ^ ord("a") ^ 512] = 2  # where its text begins in what follows the index
    table = struct.pack("<1025I", 4096, *index) + b"c\0" + b"b" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


# tokenizer.json that is refused as it is read.
UNREADABLE: dict[str, Any] = {
    "nothing": b"",
    "cut": json.dumps(SMALL).encode()[:-9],
    "no UTF-8": b'{"version": "\xff"}',
    "half a character": step(version="\ud800"),
    "a list": [],
    "deep": b"[" * 10**6,
    "deep inside": b'{"model": {}, "normalizer": ' + b'{"type":"Sequence","normalizers":[' * 10**5,
    "deep and whole": b'{"model": {}, "decoder": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep model": b'{"model": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "no model": {"version": "1.0"},
    "model null": {"model": None},
    "a version of another type": step(version=[1]),
    "vocabulary of another type": model(vocab=["a"]),
    "an id that is not a number": model(vocab={"a": "0"}),
    "an id below": model(vocab={"a": -1}),
    "an id beyond 32 bits": model(vocab={"a": 2**32}),
    "a merge of one": model(merges=["ab"]),
    "a merge of an unknown token": model(merges=[["a", "z"]]),
    "a merge to an unknown token": model(merges=[["b", "a"]]),
    "dropout": model(dropout=2.0),
    "a panic in merges": model(continuing_subword_prefix="##########"),
    "an unknown model": model(type="Mamba"),
    "an unknown step": step(normalizer={"type": "Nothing"}),
    "an invalid pattern": split({"Regex": "("}),
    "a deep pattern": split({"Regex": "(" * 5000 + ")" * 5000}),
    "an endless pattern": split({"Regex": r"(?<n>a\g<n>|\g<n>)"}),
    "an added token of no id": step(added_tokens=[{**TOKEN, "content": "<x>", "id": None}]),
    "an added token's id below": step(added_tokens=[{**TOKEN, "content": "<x>", "id": -1}]),
    "a table that is none": charsmap(b"abc"),
    "a table of 4 GB": charsmap(struct.pack("<I", 2**32 - 1) * 4),
    "a unigram's unknown id": step(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}),
    "words of any length": step(model=WORDS | {"max_input_chars_per_word": 2**60}),
    "2 to the 40 bytes": longer("normalizer", "normalizers", REPLACE, 40),
    "2 to the 40 letters": longer("pre_tokenizer", "pretokenizers", BYTES, 40),
    "2 to the 40 texts": longer("post_processor", "processors", template(WHOLE, WHOLE)["post_processor"], 40),
    "2 to the 40 parts": longer("decoder", "decoders", REPLACE, 40),
    "2 to the 16 letters for none": longer("normalizer", "normalizers", NOTHING, 16),
    "2 to the 16 letters in front": longer("normalizer", "normalizers", PREPEND | {"prepend": "a"}, 16),
    "10,000 letters in front": step(normalizer={"type": "Prepend", "prepend": "a" * 10**4}),
    "10,000 letters in front, of no type": step(normalizer={"prepend": "a" * 10**4}),
    "10,000 letters as a list": step(normalizer=["a" * 10**4]),
    "10,000 letters beside an empty sequence": step(
        normalizer={"type": "Prepend", "prepend": "a" * 10**4, "normalizers": []}
    ),
    "18 to the 7 letters": longer("normalizer", "normalizers", sequence("normalizers", LETTERS, NFKC), 7),
    "10,000 letters for one": step(normalizer=sentencepiece(10**4)),
    "200 times 200 ids": template(
        *[PIECE] * 200, WHOLE, **{"[X]": {"id": "[X]", "ids": [0] * 200, "tokens": ["a"] * 200}}
    ),
    "200 times 200 ids as a list": template(
        *[{"SpecialToken": ["[X]", 0]}] * 200, WHOLE, **{"[X]": ["[X]", [0] * 200, ["a"] * 200]}
    ),
    "a template's token that is a number": template(PIECE, WHOLE, **{"[X]": 5}),
    "a template's token that is null": template(PIECE, WHOLE, **{"[X]": None}),
    "a template's token that is a text": template(PIECE, WHOLE, **{"[X]": "<s>"}),
    "steps that are a number": step(normalizer={"type": "Sequence", "normalizers": 5}),
    "a template's token of 100,000 letters": template(
        PIECE, WHOLE, **{"[X]": {"id": "[X]", "ids": [0], "tokens": ["a" * 10**5]}}
    ),
    "101 steps": longer("normalizer", "normalizers", {"type": "Lowercase"}, 100),
    "17 letters for one in decoding": step(decoder=REPLACE | {"content": "a" * 17}),
    "a token of 4,097 letters": model(vocab=MODEL["vocab"] | {"é" * 4097: 5}),
    "an added token of 4,097 letters": step(added_tokens=[{**TOKEN, "content": "x" * 4097}]),
    "a prefix of 4,097 letters": step(
        model=WORDS | {"max_input_chars_per_word": 100, "continuing_subword_prefix": "#" * 4097}
    ),
    "a suffix of 4,097 letters": model(end_of_word_suffix="#" * 4097, merges=[]),
    "a key twice": json.dumps(longer("normalizer", "normalizers", REPLACE, 40))[:-1].encode()
    + b', "normalizer": {"type": "Nothing"}}',
}

# tokenizer.json that the library takes, and at some text does not.
UNUSABLE: dict[str, Any] = {
    "no unknown token": model(unk_token="<nope>"),
    "WordLevel without one": step(model={"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}),
    "Unigram without one": step(model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}),
    "a pattern without end": split({"Regex": "(a|aa)+$"}),
    "a table of one entry": charsmap(struct.pack("<III", 4, 0, 0)),
    "pieces of no length": step(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a template of an unknown token": template(PIECE, WHOLE),
    "a template of another text": template({"Sequence": {"id": "B", "type_id": 0}}),
    "a decoder that takes more than there is": step(decoder=STRIP),
}

# What the error says: the settings.
SETTINGS: dict[str, tuple[str, Any]] = {
    "a JSON list, not an object": ("tokenizer_config.json", [ENDS]),
    "Expecting value": ("tokenizer_config.json", b""),
    "nested too deeply": ("tokenizer_config.json", b"[" * 10**6),
    "more than 16,777,216": ("tokenizer_config.json", b" " * (2**24 + 1)),
    r"tokenizer_class: \['x'\] \(Expected `str": ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
    r"add_bos_token: 'no' \(Expected `bool": ("tokenizer_config.json", ENDS | {"add_bos_token": "no"}),
    r"add_eos_token: 1 \(Expected `bool": ("tokenizer_config.json", {"add_eos_token": 1}),
    r"add_prefix_space: 'no' \(Expected `bool": ("tokenizer_config.json", {"add_prefix_space": "no"}),
    r"split_special_tokens: 'no' \(": ("tokenizer_config.json", {"split_special_tokens": "no"}),
    r"clean_up_tokenization_spaces: 'no' \(": (
        "tokenizer_config.json",
        {"clean_up_tokenization_spaces": "no"},
    ),
    r"eos_token: 2 \(Expected": ("tokenizer_config.json", {"eos_token": 2}),
    r"eos_token: .*missing required field `content`": ("tokenizer_config.json", {"eos_token": {}}),
    r"eos_token.lstrip: 1 \(Expected `bool": (
        "tokenizer_config.json",
        {"eos_token": {"content": "</s>", "lstrip": 1}},
    ),
    "missing required field `content` *": ("tokenizer_config.json", {"image_token": {"id": 4}}),
    "surrogates not allowed": ("tokenizer_config.json", {"eos_token": "\ud800"}),
    "added_tokens_decoder: .*Expected `object`": ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    "matching regex": ("tokenizer_config.json", {"added_tokens_decoder": {"x": "<x>"}}),
    "Expected `str` matching": ("tokenizer_config.json", {"added_tokens_decoder": {"1" * 5000: "<x>"}}),
    r"additional_special_tokens: '<x>' \(": (
        "tokenizer_config.json",
        {"additional_special_tokens": "<x>"},
    ),
    r"extra_special_tokens\[0\]: 3 \(": ("tokenizer_config.json", {"extra_special_tokens": [3]}),
    r"chat_template: 3 \(Expected": ("tokenizer_config.json", {"chat_template": 3}),
    "chat_template.*missing required field": ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}),
    "must be in the vocabulary, without": (
        "tokenizer_config.json",
        ENDS | {"bos_token": "<s:1>", "add_bos_token": True},
    ),
    "in the vocabulary, without .*\n.*''": (
        "tokenizer_config.json",
        ENDS | {"bos_token": "", "add_bos_token": True},
    ),
    r"pad_token: \['</s>'\] \(": ("special_tokens_map.json", {"pad_token": ["</s>"]}),
    r"additional_special_tokens: \{\} \(": ("special_tokens_map.json", {"additional_special_tokens": {}}),
    "Expected `int`, got `str`": ("added_tokens.json", {"<x>": "x"}),
    "Expected `int` >= 0": ("added_tokens.json", {"<x>": -1}),
    "of length <= 4096": ("added_tokens.json", {"x" * 4097: 5}),
    r"eos_token: .*of length <= 4096": ("tokenizer_config.json", {"eos_token": "x" * 4097}),
    "chat template must be a text in UTF-8": ("chat_template.jinja", b"\xff"),
    "more than 16,777,216 *": ("chat_template.jinja", b" " * (2**24 + 1)),
}


@pytest.mark.parametrize("name", [*UNREADABLE, *UNUSABLE])
def test_a_wrong_tokenizer_is_refused(name, tmp_path):
    path = write(tmp_path, (UNREADABLE | UNUSABLE)[name])
    with pytest.raises(ModelError, match=r"remedy:   (Download|Take)"):
        used(path)


@pytest.mark.parametrize("said", SETTINGS)
def test_settings_of_another_type_are_refused_by_name(said, tmp_path):
    name, content = SETTINGS[said]
    path = write(tmp_path, **{name: content})
    with pytest.raises(ModelError, match=said.removesuffix(" *")):
        used(path)


@pytest.mark.parametrize("config", [ENDS, ENDS | {"add_prefix_space": False}])
def test_ids_may_have_gaps_up_to_the_largest_embedding(config, tmp_path, capfd):
    vocabulary = MODEL["vocab"] | {"q": 2**24 - 1}
    tokenizer = used(write(tmp_path, model(vocab=vocabulary), config))
    assert tokenizer.encode("abq") == [2, 2**24 - 1]
    assert capfd.readouterr().out == ""
    write(tmp_path, model(vocab=MODEL["vocab"] | {"q": 2**24}), config)
    with pytest.raises(ModelError, match=r"id of a token must be at most 16,777,215[\s\S]*16,777,216"):
        used(tmp_path)


def test_a_step_may_have_keys_that_are_not_its_own(tmp_path):
    decoder = {"type": "Fuse", "decoders": {"a": 1}}
    odd_ones: list[dict[str, Any]] = [PREPEND | {"normalizers": 5}, {"type": [], "normalizers": []}]
    for odd in odd_ones:
        path = write(tmp_path, step(normalizer=odd, decoder=decoder), ENDS | {"add_prefix_space": False})
        assert used(path).encode("ab") == [2]


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
TEMPLATE = template(PIECE, WHOLE, PIECE, **{"[X]": {"id": "[X]", "ids": [3], "tokens": ["<s>"]}})[
    "post_processor"
]


def quotes(of: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": of}, "content": '"'}


# Steps as of real tokenizers; the table of NFKC's has 33 bytes at most, for U+FDFA.
REAL: dict[str, dict[str, Any]] = {
    "llama 2": {
        "normalizer": sequence("normalizers", PREPEND, SPACES),
        "decoder": sequence(
            "decoders",
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "post_processor": TEMPLATE,
    },
    "llama 3": {
        "pre_tokenizer": sequence("pretokenizers", BYTES),
        "post_processor": sequence("processors", BYTES, TEMPLATE),
        "decoder": BYTES,
    },
    "qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence("pretokenizers", BYTES),
        "post_processor": BYTES,
        "decoder": BYTES,
    },
    "bert": {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": TEMPLATE,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
    "t5": {
        "normalizer": sequence(
            "normalizers",
            sentencepiece(33),
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        ),
        "pre_tokenizer": METASPACE,
        "post_processor": TEMPLATE,
        "decoder": METASPACE,
    },
    "albert": {
        "normalizer": sequence(
            "normalizers",
            quotes("``"),
            quotes("''"),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            sentencepiece(33),
        ),
        "pre_tokenizer": sequence("pretokenizers", {"type": "WhitespaceSplit"}, METASPACE),
        "post_processor": TEMPLATE,
        "decoder": METASPACE,
    },
}


@pytest.mark.parametrize("name", REAL)
def test_the_steps_of_real_tokenizers_are_within_the_bounds(name, tmp_path):
    assert load_tokenizer(write(tmp_path, step(**REAL[name]))).vocab_size == 5


def test_a_table_of_characters_is_as_long_as_its_longest_text(tmp_path):
    longest = _MAX_GROWTH
    backend = load_tokenizer(write(tmp_path, step(normalizer=sentencepiece(longest)))).backend
    assert backend.normalizer.normalize_str("xa") == "x" + "b" * longest
    write(tmp_path, step(normalizer=sentencepiece(longest + 1)))
    with pytest.raises(ModelError, match=r"more than 8,192 times[\s\S]*up to 8,193 times"):
        load_tokenizer(tmp_path)


def test_the_normal_forms_lengthen_no_character_more_than_is_reckoned():
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        characters = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
        growth = max(len(unicodedata.normalize(form, c).encode()) / len(c.encode()) for c in characters)
        assert growth <= _GROWTH[form] < growth + 1


def test_a_tokenizer_has_its_bound(tmp_path):
    path = write(tmp_path)
    with open(path / "tokenizer.json", "r+b") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ModelError, match="more than 67,108,864"):
        used(path)


def test_what_is_unusual_but_right_is_read(tmp_path):
    config = ENDS | {
        "added_tokens_decoder": {"4": {"content": "</s>", "lstrip": False, "special": True, "unknown": 1}},
        "additional_special_tokens": None,
        "chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}],
        "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": 10**30,
        "pad_token": None,
    }
    tokenizer = used(
        write(tmp_path, step(padding=None, truncation=None, later={"by": "a newer version"}), config)
    )
    assert tokenizer.encode("ab</s><image>") == [2, 4, 5]
    assert tokenizer.chat_template == {"default": "d", "rag": "r"}
    assert tokenizer.end_token_ids == (4,)


def test_an_interrupt_is_none_of_the_librarys_refusals():
    from hylorada_jax.models.tokenizer_backend import refusing

    for other in (KeyboardInterrupt, SystemExit, TypeError):
        with pytest.raises(other), refusing():
            raise other
