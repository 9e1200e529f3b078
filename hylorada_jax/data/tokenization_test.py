from functools import partial

import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from hylorada_jax.data.examples import Document
from hylorada_jax.data.tokenization import prepare, tokenize
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models.tokenizer import Tokenizer


def test_documents_become_tokens_with_one_end_and_uncut():
    backend = tokenizers.Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    documents = [Document("x", "a b a c"), Document("y", "b </s>"), Document("z", "b")]
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    assert tokenizer.encode_prompt("a b a c").ids == [1, 2, 1, 0]
    found = tokenize(documents, tokenizer)
    assert [document.tokens.tolist() for document in found] == [[1, 2, 1, 0, 3], [2, 3], [2, 3]]
    assert [document.name for document in found] == ["x", "y", "z"]
    assert [document.tokens.tolist() for document in tokenize(documents[2:], Tokenizer(backend))] == [[2]]


def test_documents_may_come_from_an_iterator():
    documents = [Document("x", "ab"), Document("y", "c")]
    one, two = (tokenize(given, byte_tokenizer()) for given in (documents, iter(documents)))
    assert [each.tokens.tolist() for each in one] == [each.tokens.tolist() for each in two]
    _, counts = prepare((each for each in documents), byte_tokenizer(), seq_len=8)
    assert counts.rows == 2


def test_half_a_character_is_encoded_as_the_replacement_character():
    halved, whole = (Document("x", f"cut {end}") for end in ("\ud83d", "\ufffd"))
    tokenizer = byte_tokenizer()
    with pytest.warns(UserWarning, match="do not parse"):
        (found,) = tokenize([halved], tokenizer, "code")
    (expected,) = tokenize([whole], tokenizer)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert found.structure_ids is not None
    assert len(found.structure_ids) == len(found.tokens)
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        assert encode(halved.text) == encode(whole.text)


def byte_tokenizer():
    """A token for each byte, a template that begins a text, and a token that ends one."""
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.normalizer, backend.pre_tokenizer = NFC(), ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, {"eos_token": "</s>"})


def test_structure_ids_follow_the_tokens_and_what_does_not_parse_is_named():
    # é in two characters, which the tokenizer composes: later offsets are those of the text as it was.
    documents = [
        Document("a.py", "e\u0301 = [1]\nif x:\n y"),
        Document("b.py", "if:\n y"),
        Document("c.py", "x</s>"),
    ]
    with pytest.warns(UserWarning, match=r"2 of 3 documents do not parse.*, b\.py, c\.py$"):
        found = tokenize(documents, byte_tokenizer(), "code")
    for document, plain in zip(found, tokenize(documents, byte_tokenizer()), strict=True):
        np.testing.assert_array_equal(document.tokens, plain.tokens)
        assert plain.structure_ids is None
    # begin, é of two bytes, " = [1]", "\nif x:", "\n ", y, end; "</s>" in a text is the end already
    by_hand = [[0, 0, 0, *[0, 0, 0, 0, 1, 0], *[0] * 6, *[0, 0], 1, 0], [0, *[0] * 3, 0, 0, 1, 0], [0, 0, 0]]
    ids = [document.structure_ids for document in found if document.structure_ids is not None]
    assert [values.tolist() for values in ids] == by_hand
    assert all(values.dtype == np.int32 for values in ids)
    with pytest.raises(ConfigError, match="code"):
        tokenize(documents, byte_tokenizer(), "music")  # type: ignore[arg-type]


@pytest.mark.parametrize("examples", ["a", ["a"], [b"a"], [{"text": "a"}], Document("x", "a")])
def test_what_was_not_read_as_a_row_is_refused(examples):
    for make in (tokenize, partial(prepare, seq_len=8)):
        with pytest.raises(DataError, match=r" at 0[\s\S]*load_documents"):
            make(examples, byte_tokenizer())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"score": "answer"}, "score must be one of answers, last, all"),
        ({"overlength": "dropp"}, "Did you mean drop"),
        ({"seq_len": -5}, "seq_len -5"),
    ],
)
def test_an_unknown_way_to_prepare_documents_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        prepare([Document("x", "a")], byte_tokenizer(), **{"seq_len": 8} | given)
