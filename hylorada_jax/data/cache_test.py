"""Oracle: the same without the cache. What is damaged, stale or in the way changes nothing but the time."""

import datetime
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from hylorada_jax.data import cache, tokenization
from hylorada_jax.data.document import STRUCTURE
from hylorada_jax.data.examples import Completion, Conversation, Document, Example
from hylorada_jax.data.tokenization import prepare
from hylorada_jax.data.tokenization_test import byte_tokenizer
from hylorada_jax.errors import DataError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if messages[-1].content == 'no' %}{{ raise_exception('refused') }}{% endif %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
EXAMPLES: list[Example] = [
    Conversation("chat", CHAT, [False, True]),
    Conversation("without an answer", CHAT, [False, False]),
    Document("a.py", "x = [1]\nif x:\n y"),
    Document("b.py", "if:\n y"),
    Completion("long", "1 + 1 =", " 2" * 40),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORADA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tokenizer():
    return replace(byte_tokenizer(), chat_template=TEMPLATE)


def run(tokenizer, *, keep, structure=None):
    """What is prepared and what is warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        documents, counts = prepare(EXAMPLES, tokenizer, 24, structure=structure, keep=keep)
    return documents, counts, [str(warning.message) for warning in warned]


def assert_equal(found, expected):
    assert found[1:] == expected[1:]
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.name == other.name
        for name in ("tokens", "scored", *STRUCTURE):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


@pytest.mark.parametrize("structure", [None, "code"])
def test_a_second_time_the_same_comes_from_disk(place, tokenizer, monkeypatch, structure):
    expected = run(tokenizer, keep=False, structure=structure)
    assert (expected[1].unscored, expected[1].truncated, len(expected[2])) == (1, 1, structure == "code")
    assert not place.exists()
    assert_equal(run(tokenizer, keep=True, structure=structure), expected)
    monkeypatch.setattr(tokenization, "_tokenized", lambda *_: pytest.fail("tokenized anew"))
    assert_equal(run(tokenizer, keep=True, structure=structure), expected)


def test_a_damaged_file_is_made_anew(place, tokenizer):
    expected = run(tokenizer, keep=True)
    (file,) = place.iterdir()
    whole = file.read_bytes()
    flipped = [
        whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(0, len(whole), len(whole) // 40)
    ]
    for damaged in (b"", whole[:-1], whole[:20], whole + b"x", *flipped):
        file.write_bytes(damaged)
        assert_equal(run(tokenizer, keep=True), expected)
        assert file.read_bytes() == whole


def test_all_that_decides_the_tokens_is_in_the_key(tokenizer, monkeypatch):
    options = {"seq_len": 8, "score": "answers"}
    other = byte_tokenizer()
    other.backend.add_tokens(["ab"])
    splitting = byte_tokenizer()
    splitting.backend.encode_special_tokens = True
    dated = replace(tokenizer, chat_template=TEMPLATE + "{{ strftime_now('%d') }}")
    calls = [
        (EXAMPLES, tokenizer, options),
        (EXAMPLES[:-1], tokenizer, options),
        ([*EXAMPLES[:-1], EXAMPLES[-1]._replace(name="other")], tokenizer, options),
        ([EXAMPLES[0]._replace(variables={"a": 1}), *EXAMPLES[1:]], tokenizer, options),  # type: ignore[call-arg]
        (EXAMPLES, replace(tokenizer, backend=other.backend), options),
        (EXAMPLES, replace(tokenizer, backend=splitting.backend), options),
        (EXAMPLES, replace(tokenizer, special_tokens={}), options),
        (EXAMPLES, replace(tokenizer, end_token_ids=(1,)), options),
        (EXAMPLES, replace(tokenizer, chat_template=TEMPLATE + " "), options),
        (EXAMPLES, dated, options),
        *((EXAMPLES, tokenizer, options | {name: "other"}) for name in options),
    ]
    keys = [cache.key_of(*call) for call in calls]
    assert len({*keys}) == len(calls)
    assert [cache.key_of(*call) for call in calls] == keys
    today = datetime.date.today()

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return today + datetime.timedelta(1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert [cache.key_of(*call) == key for call, key in zip(calls, keys, strict=True)] == [
        call[1] is not dated for call in calls
    ]
    monkeypatch.setattr(cache, "source_sha256", lambda: "of another version")
    assert not {cache.key_of(*call) for call in calls} & {*keys}


def test_a_tokenizer_with_gaps_in_its_ids_prints_none_of_them_and_nothing_is_kept(place, tokenizer, capfd):
    for vocabulary in ({"a": 0, "b": 2}, {"a": 0, "b": 0, "c": 2}, {"a": 0, "b": 2**24 - 1}):
        apart = replace(tokenizer, backend=tokenizers.Tokenizer(models.WordLevel(vocabulary, "a")))
        apart.backend.pre_tokenizer = pre_tokenizers.Whitespace()
        documents, _ = prepare([Document("a", "b a")], apart, 24, keep=True)
        assert [document.tokens.tolist() for document in documents] == [[vocabulary["b"], 0]]
    assert capfd.readouterr().out == ""
    assert not place.exists()


def test_rows_that_are_skipped_are_listed_each_time(place, tokenizer):
    refused = Conversation("refused", [CHAT[0], CHAT[1] | {"content": "no"}], [False, True])
    for _ in range(2):
        skipped: list[DataError] = []
        _, counts = prepare([refused, *EXAMPLES], tokenizer, 24, skipped=skipped, keep=True)
        assert [str(error.received).partition(":")[0] for error in skipped] == ["refused"]
        assert (counts.rows, counts.unscored) == (6, 1)
    assert not place.exists()


def test_what_was_not_used_for_longest_makes_room(place, tokenizer, monkeypatch):
    (place / "theirs").mkdir(parents=True)
    (place / "theirs.safetensors").write_bytes(b"x" * 1000)
    (place / f".hylorada-{'0' * 16}").write_bytes(b"left by a kill")
    os.utime(place / f".hylorada-{'0' * 16}", (0, 0))
    theirs = {"theirs", "theirs.safetensors"}
    made: list[str] = []
    for number in range(4):
        prepare(EXAMPLES[number : number + 1], tokenizer, 24, keep=True)
        (new,) = {path.name for path in place.iterdir()} - theirs - {*made} - {f".hylorada-{'0' * 16}"}
        made.append(new)
        os.utime(place / new, (number + 1, number + 1))
    prepare(EXAMPLES[:1], tokenizer, 24, keep=True)  # it was used
    monkeypatch.setattr(cache, "ROOM", sum((place / name).stat().st_size for name in made[2:]) + 1000)
    prepare(EXAMPLES[4:], tokenizer, 24, keep=True)
    left = {path.name for path in place.iterdir()}
    assert theirs | {made[0]} < left
    assert not left & {made[1], f".hylorada-{'0' * 16}"}
    monkeypatch.setattr(cache, "LARGEST", 10)
    prepare(EXAMPLES, tokenizer, 24, keep=True)
    assert {path.name for path in place.iterdir()} == left


def test_where_it_cannot_or_shall_not_be_written_nothing_is(tmp_path, tokenizer, monkeypatch):
    expected = run(tokenizer, keep=False)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for said in (str(tmp_path / "file"), "off"):
        monkeypatch.setenv("HYLORADA_CACHE", said)
        assert_equal(run(tokenizer, keep=True), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_is_in_the_users_cache_unless_it_is_moved(monkeypatch, tmp_path):
    monkeypatch.delenv("HYLORADA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "hylorada" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.directory() == tmp_path / "x" / "hylorada" / "tokens"
    monkeypatch.setenv("HYLORADA_CACHE", "~/y")
    assert cache.directory() == tmp_path / "y" / "tokens"
