"""Tokenizers of model directories give transformers' ids, whichever of their files says so."""

import json
from functools import partial

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from hylorada_jax.errors import ModelError
from hylorada_jax.evaluation.retrieval import contexts
from hylorada_jax.models.segments import specials_of
from hylorada_jax.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "The cat",
    " leading  spaces ",
    "Grüße 🤦, 42!",
    "<s>The</s> cat<pad>",
    "The<tool> cat <extra>The <late>",
    "",
]
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<tool>", "<extra>", "<|endoftext|>")
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_MODEL = {"model_type": "llama"}
PLAIN_MODEL = LLAMA_MODEL | {"tokenizer_class": "PreTrainedTokenizerFast"}
FIVE = transformers.__version__.startswith("5")


def bpe(tokens, words, **settings):
    """A byte-pair encoding that joins each of the words from its letters."""
    vocabulary, merges = dict.fromkeys([*SPECIAL, *tokens]), []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary |= dict.fromkeys([*word[:end], word[:end]])
    numbered = {token: index for index, token in enumerate(vocabulary)}
    return tokenizers.Tokenizer(models.BPE(numbered, merges, **settings))


def byte_level():
    """As of GPT-2 and Llama 3."""
    tokenizer = bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), ["The", "Ġcat"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def prefixed():
    """The same, with a space in front of every text."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def llama2():
    """As of Llama 2: sentencepiece's spaces and bytes."""
    words = ["▁The", "▁cat"]
    tokenizer = bpe(
        [f"<0x{byte:02X}>" for byte in range(256)],
        words,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace():
    """The same as transformers 5 writes it."""
    tokenizer = llama2()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


def test_the_answer_of_a_probe_is_in_its_context_by_the_same_tokens():
    for make in (llama2, metaspace, lambda: load_tokenizer("smollm2-135m").backend):
        context = contexts(Tokenizer(make()), 4096, 1)[3]
        tokens, asked = context["tokens"], len(context["answer"]) + 1  # with the token before it
        runs = [tokens[place : place + asked] for place in range(len(tokens) - asked)]
        assert runs.count(tokens[-asked:]) == 1


def word_piece(cleanup=True):
    """As of BERT."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "cat", "##s", ",", "!"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def wrapped(make, single="<s> $A"):
    """With a post-processor that adds what `single` has."""

    def made():
        tokenizer = make()
        ends = [(end, tokenizer.token_to_id(end)) for end in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
        return tokenizer

    return made


def holding(make, *tokens):
    """With added tokens in tokenizer.json."""

    def made():
        tokenizer = make()
        tokenizer.add_tokens([*tokens])
        return tokenizer

    return made


def token(content, **properties):
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **plain, **properties}


def write(path, make, config=None, files=None, model_config=LLAMA_MODEL):
    """A model directory; `files` are those beside tokenizer.json, `config` is tokenizer_config.json."""
    make().save(str(path / "tokenizer.json"))
    named = {"tokenizer_config.json": config, "config.json": model_config, **(files or {})}
    for name, content in named.items():
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


UNK, LATE = {"unk_token": "<unk>"}, token("<late>") | {"__type": "AddedToken"}
FAST, LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizer"}
GPT2, NEOX = {"tokenizer_class": "GPT2TokenizerFast"}, {"tokenizer_class": "GPTNeoXTokenizerFast"}
BERT = {"tokenizer_class": "BertTokenizer"}
MAP = {"special_tokens_map.json": {"bos_token": "<pad>", "eos_token": token("<extra>"), "pad_token": "<s>"}}
DECODER = {"added_tokens_decoder": {"1": token("</s>"), "4": token("<tool>", special=False)}}
BYTES = byte_level
SPECIAL_AND_LONGER = [AddedToken(content, special=True, normalized=False) for content in ("<s>", "<s>>")]
# name: (tokenizer, tokenizer_config.json, other files, config.json)
CASES: dict[str, tuple] = {
    "nothing beside it": (wrapped(BYTES), None, {}, PLAIN_MODEL),
    "named as text": (BYTES, FAST | NAMED),
    "named as tokens": (BYTES, FAST | {"eos_token": token("</s>") | {"__type": "AddedToken"}}),
    "named null": (BYTES, FAST | NAMED | {"bos_token": None}),
    "beginning added": (wrapped(BYTES), FAST | NAMED),
    "both ends added": (wrapped(BYTES, "<s> $A </s>"), FAST | NAMED),
    "flags that the class does not read": (wrapped(BYTES), FAST | NAMED | {"add_bos_token": False}),
    "the old form's map wins": (BYTES, FAST | NAMED, MAP),
    "the new form's map loses": (BYTES, FAST | NAMED | DECODER, MAP),
    "the new form is empty": (BYTES, FAST | NAMED | {"added_tokens_decoder": {}}, MAP),
    "only the map": (BYTES, None, MAP, PLAIN_MODEL),
    "only added_tokens_decoder": (BYTES, FAST | DECODER),
    "added_tokens_decoder beyond the vocabulary": (
        BYTES,
        FAST | {"eos_token": "<late>", "added_tokens_decoder": {"900": token("<late>")}},
    ),
    "added_tokens.json": (BYTES, FAST | {"eos_token": "<late>"}, {"added_tokens.json": {"<late>": 900}}),
    "added_tokens.json, not special": (
        BYTES,
        FAST | NAMED,
        {"added_tokens.json": {"<late>": 900, "<tool>": 4}},
    ),
    "eos in the map and added_tokens.json": (
        holding(BYTES, AddedToken("<pad>", special=True)),
        None,
        {"special_tokens_map.json": {"eos_token": "<late>"}, "added_tokens.json": {"<late>": 900}},
        PLAIN_MODEL,
    ),
    "another special flag": (
        holding(BYTES, AddedToken("</s>", special=False), AddedToken("<tool>", special=True)),
        FAST | NAMED | DECODER,
    ),
    "strips around a token": (BYTES, FAST | {"added_tokens_decoder": {"4": token("<tool>", rstrip=True)}}),
    "a token that begins another": (holding(BYTES, *SPECIAL_AND_LONGER), FAST | NAMED),
    "named but not in the vocabulary": (BYTES, FAST | {"eos_token": "<late>", "bos_token": "<early>"}),
    "more special tokens": (BYTES, FAST | NAMED | {"additional_special_tokens": ["<tool>", LATE]}),
    "special tokens are split": (BYTES, FAST | NAMED | DECODER | {"split_special_tokens": True}),
    "llama 2": (wrapped(llama2), FAST | NAMED | UNK | {"legacy": False}),
    "metaspace": (wrapped(metaspace), LLAMA | NAMED | UNK | {"legacy": False, "add_bos_token": True}),
    "the class's own names": (wrapped(metaspace), LLAMA),
    "the model type's names": (BYTES, None, {}, {"model_type": "gpt2"}),
    "GPT-2 without a space": (prefixed, GPT2 | UNK | NAMED),
    "GPT-2 with a space": (BYTES, GPT2 | NAMED | UNK | {"add_prefix_space": True}),
    "BERT": (word_piece, BERT, {}, {"model_type": "bert"}),
    "spaces cleaned up": (partial(word_piece, cleanup=False), BERT | {"clean_up_tokenization_spaces": True}),
}
# What contradicts tokenizer.json counts as in transformers 4, whose files these are.
FOUR = {
    "the family's names": (wrapped(metaspace), None),
    "no beginning after all": (wrapped(BYTES), LLAMA | NAMED | UNK | {"add_bos_token": False}),
    "the end too": (wrapped(llama2), LLAMA | NAMED | UNK | {"add_eos_token": True}),
    "by the model type": (wrapped(llama2), {"add_bos_token": False}),
    "a beginning that was not added": (BYTES, NEOX | NAMED | UNK | {"add_bos_token": True}),
    "only the end": (BYTES, NEOX | NAMED | UNK | {"add_eos_token": True}),
    "a space that was not set": (BYTES, FAST | NAMED | {"add_prefix_space": True}),
}
# Else the newest version is followed.
SINCE_5 = {
    "spaces of a byte-pair encoding": (BYTES, FAST | NAMED | {"clean_up_tokenization_spaces": True}),
    "no space in front": (wrapped(metaspace), LLAMA | NAMED | {"add_prefix_space": False}),
    "named for the model": (BYTES, FAST | NAMED | {"image_token": "<late>"}),
}


@pytest.mark.parametrize("name", [*CASES, *(SINCE_5 if FIVE else FOUR)])
def test_ids_are_those_of_transformers(name, tmp_path):
    path = write(tmp_path, *(CASES | FOUR | SINCE_5)[name])
    ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    for role in ROLES:
        assert getattr(theirs, role) == ours.special_tokens.get(role), role
        if role != "unk_token":
            assert getattr(theirs, f"{role}_id") == getattr(ours, f"{role}_id"), role
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=True) == ids, text
        for skipped in (True, False):
            assert ours.decode(ids, skipped) == theirs.decode(ids, skip_special_tokens=skipped), text
        if "<s>" not in text:
            # Where transformers ends every text, a prompt still goes on.
            ended = ids[-1:] == [theirs.eos_token_id] and not text.endswith(theirs.eos_token)
            assert ours.encode_prompt(text).ids == ids[: len(ids) - ended]


PIECES = ["<s>", "</s>", "<pad>", "<tool>", "<extra>", "<late>", "[SEP]", "<|endoftext|>"]
PIECES += ["The", " cat", "<", "<s", " ", ">", "\n", "ü🤦", "<extra>s", "▁"]


@pytest.mark.parametrize("name", [*CASES, *(SINCE_5 if FIVE else FOUR)])
def test_texts_that_grow_are_encoded_as_each_on_its_own(name, tmp_path):
    ours = load_tokenizer(write(tmp_path, *(CASES | FOUR | SINCE_5)[name]))
    random = np.random.default_rng(0)
    texts = [""]
    for _ in range(300):
        # Some begin anew, and some part with the text before in its middle.
        kept = texts[-1][: random.choice([0, 5, 400, 400, 400])]
        texts.append(kept + "".join(random.choice(PIECES, 3)))
    assert ours.encode_each(texts) == [ours.encode_with_offsets(text) for text in texts]


@pytest.mark.parametrize(
    ("added", "parts"),
    [
        ([("<s>", {})], True),
        ([("<s>", {}), ("<s>>", {})], True),
        ([("<s>", {}), (" ", {"special": False})], True),
        ([], False),
        ([("<s>", {"rstrip": True})], False),
        ([("<s>", {"lstrip": True})], False),
        ([("<s>", {"single_word": True})], False),
        ([("<s>", {"normalized": True})], False),
        ([("<s>", {}), ("<tool", {"special": False})], False),
        ([("<s>", {}), ("a<", {"special": False})], False),
        ([("<s>", {}), ("<<", {})], False),
    ],
)
def test_special_tokens_part_a_text_where_nothing_beside_them_matters(added, parts):
    tokens = [
        AddedToken(content, **{"special": True, "normalized": False} | flags) for content, flags in added
    ]
    assert (specials_of(holding(byte_level, *tokens)()) is not None) == parts


def loaded(tmp_path, make, config, **rest):
    return load_tokenizer(write(tmp_path, make, config, **rest))


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A"])
def test_a_prompt_begins_and_a_document_ends_once(single, tmp_path):
    ours = loaded(tmp_path, wrapped(BYTES, single), FAST | NAMED)
    added = [ours.bos_token_id] * ("<s>" in single)
    text = "The cat"
    plain = ours.encode(text)
    documents = [text, f"<s>{text}", f"{text}</s>", f"<s>{text}</s>", f"<s><s>{text}</s></s>", ""]
    encoded = ours.encode_documents(documents)
    # What is written in the text is neither doubled nor taken away.
    begun = [added, [0], added, [0], [0, 0], added]
    assert [ours.encode_prompt(document).ids for document in documents] == [
        begin + body + end
        for begin, body, end in zip(
            begun,
            [plain] * 5 + [[]],
            [[], [], [1], [1], [1, 1], []],
            strict=True,
        )
    ]
    ends = [[1], [1], [1], [1], [1, 1], [1]]
    for each, begin, body, end, document in zip(
        encoded, begun, [plain] * 5 + [[]], ends, documents, strict=True
    ):
        assert each.ids == begin + body + end
        assert len(each.offsets) == len(each.ids)
        assert "".join(document[slice(*place)] for place in each.offsets) == document


@pytest.mark.parametrize("make", [llama2, metaspace, byte_level, word_piece])
@pytest.mark.parametrize("skipped", [True, False])
def test_a_prompt_and_its_continuation_are_the_text_of_both(make, skipped, tmp_path):
    ours = loaded(tmp_path, make, FAST | NAMED)
    for text in ("The cat", "the cats , the cat!", "<s>The cat</s>", "Grüße 🤦 cat", "  The   cat "):
        ids = ours.encode(text)
        whole = ours.decode(ids, skipped)
        for cut in range(len(ids) + 1):
            continuation = ours.decode_continuation(ids[:cut], ids[cut:], skipped)
            assert whole.endswith(continuation)
            before = ours.decode(ids[:cut], skipped)
            # A character of which the prompt has some bytes only belongs to the continuation.
            assert before.rstrip("\ufffd") + continuation == whole


def test_the_space_between_prompt_and_continuation_is_kept(tmp_path):
    ours = loaded(tmp_path, wrapped(llama2), LLAMA | NAMED)
    prompt, new = ours.encode_prompt("The").ids, [ours.backend.token_to_id("▁cat"), ours.eos_token_id]
    assert prompt == [ours.bos_token_id, ours.backend.token_to_id("▁The")]
    assert "The" + ours.decode_continuation(prompt, new) == "The cat"
    assert ours.decode(new) == "cat"  # as it is decoded alone
    assert ours.decode_continuation([ours.bos_token_id], new) == "cat"
    assert ours.decode_continuation(prompt, new, skip_special_tokens=False) == " cat</s>"


def test_a_byte_pair_encoding_keeps_its_spaces(tmp_path):
    # As in transformers 5; version 4 would take them out.
    ours = loaded(tmp_path, BYTES, FAST | {"clean_up_tokenization_spaces": True})
    assert ours.decode(ours.encode("The , cat !")) == "The , cat !"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token":'),
        ("special_tokens_map.json", '{"eos_token": {"contents": []}}'),
        ("added_tokens.json", '{"<late>": "x"}'),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("generation_config.json", '{"eos_token_id": [[1]]}'),
    ],
)
def test_damaged_files_are_refused(name, content, tmp_path):
    write(tmp_path, BYTES, FAST)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match="remedy"):
        load_tokenizer(tmp_path)


def test_a_space_in_front_can_be_left_out(tmp_path):
    # As in transformers 5; version 4 needs the file of sentencepiece for it.
    for make in (llama2, metaspace):
        ours = loaded(tmp_path, make, LLAMA | NAMED | {"add_prefix_space": False})
        assert ours.encode("The cat") == [*map(ours.backend.token_to_id, ["T", "h", "e", "▁cat"])]
        assert ours.decode(ours.encode(" cat")) == " cat"
