import json

import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from hylorada_jax.data.documents import (
    as_documents,
    as_structure,
    digest,
    shuffled_batches,
    tokenize,
    tokenize_with_structure,
)
from hylorada_jax.data.packing import Rows
from hylorada_jax.data.text_files import Document
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models.tokenizer import Tokenizer


def rows():
    return Rows([np.arange(n) for n in (30, 40, 50)], 8)


def drawn(batches, count):
    return [next(batches)["row"].tolist() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_epoch_has_every_row_once_in_another_order(batch_size):
    n = len(rows())
    order = np.concatenate(drawn(shuffled_batches(rows(), batch_size, seed=0), 2 * n // batch_size + 1))
    first, second = order[:n], order[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(n))


def test_the_seed_decides_the_order():
    assert drawn(shuffled_batches(rows(), 4, seed=1), 3) == drawn(shuffled_batches(rows(), 4, seed=1), 3)
    assert drawn(shuffled_batches(rows(), 4, seed=1), 3) != drawn(shuffled_batches(rows(), 4, seed=2), 3)


def test_an_iterator_goes_on_from_its_state_through_json():
    batches = shuffled_batches(rows(), 4, seed=0)
    drawn(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = drawn(batches, 6)
    again = shuffled_batches(rows(), 4, seed=0)
    again.set_state(state)
    assert drawn(again, 6) == expected


def test_a_batch_has_the_rows_it_names():
    batch = next(shuffled_batches(rows(), 4, seed=0))
    for i, row in enumerate(batch["row"]):
        for name, values in rows()[row].items():
            np.testing.assert_array_equal(batch[name][i], values)


def test_documents_become_tokens_with_one_end_and_uncut():
    backend = tokenizers.Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    documents = [Document("x", "a b a c"), Document("y", "b </s>"), Document("z", "b")]
    found = tokenize(documents, Tokenizer(backend, {"eos_token": "</s>"}))
    assert [tokens.tolist() for tokens in found] == [[1, 2, 1, 0, 3], [2, 3], [2, 3]]
    assert [tokens.tolist() for tokens in tokenize(documents[2:], Tokenizer(backend))] == [[2]]


def test_half_a_character_is_encoded_as_the_replacement_character():
    halved, whole = (Document("x", f"cut {end}") for end in ("\ud83d", "\ufffd"))
    tokenizer = byte_tokenizer()
    np.testing.assert_array_equal(tokenize([halved], tokenizer)[0], tokenize([whole], tokenizer)[0])
    found = tokenize_with_structure([halved], tokenizer)
    assert len(found.structure_ids[0]) == len(found.tokens[0])
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


def test_structure_ids_follow_the_tokens_and_what_does_not_parse_is_counted():
    # é in two characters, which the tokenizer composes: later offsets are those of the text as it was.
    documents = [
        Document("a.py", "e\u0301 = [1]\nif x:\n y"),
        Document("b.py", "if:\n y"),
        Document("c.py", "x</s>"),
    ]
    found = tokenize_with_structure(documents, byte_tokenizer(), "code")
    for tokens, expected in zip(found.tokens, tokenize(documents, byte_tokenizer()), strict=True):
        np.testing.assert_array_equal(tokens, expected)
    # begin, é of two bytes, " = [1]", "\nif x:", "\n ", y, end; "</s>" in a text is the end already
    by_hand = [[0, 0, 0, *[0, 0, 0, 0, 1, 0], *[0] * 6, *[0, 0], 1, 0], [0, *[0] * 3, 0, 0, 1, 0], [0, 0, 0]]
    assert [ids.tolist() for ids in found.structure_ids] == by_hand
    assert all(ids.dtype == np.int32 for ids in found.structure_ids)
    assert found.unparsed == ["b.py", "c.py"]
    with pytest.raises(ConfigError, match="code"):
        tokenize_with_structure(documents, byte_tokenizer(), "music")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ([[1, 2, 3]], "1 sequences of ids for 2 documents"),
        ([[1, 2, 3], [1, 2, 3]], r"document 1: int64 of shape \(3,\), for 2 tokens"),
        ([[1, 2, 3], [[1], [2]]], "document 1"),
        ([[0.5, 1, 2], [1, 2]], "document 0: float64"),
        ([[1, 2, 3], [0, -1]], "from -1"),
    ],
)
def test_structure_ids_that_do_not_fit_are_named(structure, said):
    documents = as_documents([[1, 2, 3], [4, 5]], 10, "training")
    with pytest.raises(DataError, match=said):
        as_structure(structure, documents, "training", has_encoder=True)


def test_structure_ids_are_checked_for_a_model_that_reads_them():
    documents = as_documents([[1, 2, 3], []], 10, "training")
    found = as_structure([[0, 1, 2], []], documents, "training", has_encoder=True)
    assert found is not None
    assert [ids.tolist() for ids in found] == [[0, 1, 2], []]
    assert as_structure(None, documents, "training", has_encoder=False) is None
    with pytest.raises(ConfigError, match="hylorada_v2"):
        as_structure([[0, 1, 2], []], documents, "training", has_encoder=False)


def test_the_digest_depends_on_tokens_order_and_boundaries():
    variants = [[[1, 2, 3]], [[1, 2], [3]], [[3], [1, 2]], [[1, 2, 4]], [[1, 2, 3], []]]
    digests = [digest([np.array(tokens, np.int32) for tokens in variant]) for variant in variants]
    assert len(set(digests)) == len(variants)
    assert digest([np.array([1, 2, 3])]) == digests[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["text"], "Tokenize"),
        ([[1.5, 2.0]], "Tokenize"),
        ([[[1, 2]]], "Tokenize"),
        ([[1, 2], [3, 10]], "document 1: 3 … 10"),
        ([[1, -1]], "document 0: -1 … 1"),
        ([], "0 documents"),
        ([[1], []], "2 documents"),
    ],
)
def test_unusable_documents_are_named(data, said):
    with pytest.raises(DataError, match=said):
        as_documents(data, 10, "training")
