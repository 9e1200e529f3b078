import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest

from hylorada_jax.data.document import STRUCTURE, TokenizedDocument, as_documents, digest
from hylorada_jax.errors import ConfigError, DataError

FIELDS = [
    field.name for field in dataclasses.fields(TokenizedDocument) if field.name not in ("tokens", "name")
]


def record(tokens, scored=None, **fields):
    """Of plain lists, as a user may have them."""
    return TokenizedDocument(tokens, scored, **fields)


def checked(*documents, has_encoder=True):
    return as_documents(documents, 10, "training", has_encoder=has_encoder)


def test_records_and_bare_ids_become_records_of_arrays():
    fields = {"scored": [False, True, False], "structure_ids": [0, 1, 2], "structure_positions": [0.5, 1, 54]}
    full, empty = checked(
        record([1, 2, 3], **fields, name="a.py"),
        record([], **{name: [] for name in FIELDS}),
    )
    assert (full.name, len(full), len(empty)) == ("a.py", 3, 0)
    for document, lists in ((full, {"tokens": [1, 2, 3], **fields}), (empty, {name: [] for name in fields})):
        for name, values in lists.items():
            assert getattr(document, name).tolist() == values
    dtypes = [getattr(document, name).dtype for document in (full, empty) for name in ("tokens", *FIELDS)]
    assert dtypes == [np.int32, np.bool_, np.int32, np.float32] * 2
    for (bare,) in (checked([1, 2]), checked(np.array([1, 2], np.uint8)), checked(record([1, 2]))):
        assert (bare.tokens.tolist(), bare.tokens.dtype) == ([1, 2], np.int32)
        assert [getattr(bare, name) for name in FIELDS] == [None] * 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([{"structure_ids": [1, 2, 3]}, {}], "structure_ids, or none[\\s\\S]*1 of 2 documents"),
        ([{}, {"structure_positions": [1, 2]}], "structure_positions, or none[\\s\\S]*1 of 2 documents"),
        ([{"structure_ids": [1, 2, 3]}] * 2, r"document 1: int64 of shape \(3,\), for 2 tokens"),
        ([{"structure_ids": [1, 2, 3]}, {"structure_ids": [[1], [2]]}], "document 1: int64"),
        ([{"structure_ids": [0.5, 1, 2]}, {"structure_ids": [1, 2]}], "document 0: float64"),
        ([{"structure_ids": [1, 2, 3]}, {"structure_ids": [0, -1]}], "document 1: -1 … 0"),
        ([{"structure_positions": [1.0, 2.0]}] * 2, r"document 0: float64 of shape \(2,\), for 3 tokens"),
        ([{"structure_positions": [0, 1, np.nan]}, {}], "document 0: nan"),
        ([{"structure_positions": [0, 1e39, 1]}, {}], r"document 0: 1e\+39"),
        ([{"structure_positions": ["a", "b", "c"]}, {}], "document 0: <U1"),
        ([{}, {"scored": [True]}], r"document 1: bool of shape \(1,\), for 2 tokens"),
        ([{"scored": [0, 1, 1]}, {}], "bools[\\s\\S]*document 0: int64"),
        ([{"scored": [True, False, False]}, {"scored": [False, False]}], "2 documents without one"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, said):
    with pytest.raises(DataError, match=said):
        checked(*(record(ids, **own) for ids, own in zip([[1, 2, 3], [4, 5]], fields, strict=True)))


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_is_for_a_model_that_reads_it(name):
    with pytest.raises(ConfigError, match=f"{name} of the training data[\\s\\S]*hylorada_v2"):
        checked(record([1, 2], **{name: [0, 1]}), has_encoder=False)
    checked(record([1, 2], [True, True]), has_encoder=False)


def test_the_digest_depends_on_tokens_order_and_boundaries():
    variants = [[[1, 2, 3]], [[1, 2], [3]], [[3], [1, 2]], [[1, 2, 4]], [[1, 2, 3], []]]
    digests = [digest([record(np.array(t, np.int32)) for t in variant]) for variant in variants]
    assert len(set(digests)) == len(variants)
    assert digest([record(np.array([1, 2, 3]))]) == digests[0]


def test_the_digest_depends_on_what_is_scored_and_on_structure_but_not_on_names():
    mask = {"scored": [True, True, False]}
    others: list[dict[str, Any]] = [
        {"scored": [True, False, True]},
        {"structure_ids": [0, 0, 0]},
        {"structure_positions": [0, 0, 0]},  # of the same bytes
    ]
    found = [digest(checked(record([1, 2, 3], **own))) for own in ({}, mask, *others, mask | others[1])]
    assert len(set(found)) == len(found)
    assert digest(checked(record([1, 2, 3], name="a.py"))) == found[0]
    # Of tokens alone it is what run.json and the benchmarks' records have.
    tokens = np.array([1, 2, 3], "<i4").tobytes()
    assert found[0] == hashlib.sha256(b"\3" + b"\0" * 7 + tokens).hexdigest()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["text"], "Tokenize"),
        ([[1.5, 2.0]], "Tokenize"),
        ([[[1, 2]]], "Tokenize"),
        ([record("text")], "Tokenize"),
        ([[1, 2], [3, 10]], "document 1: 3 … 10"),
        ([[1, -1]], "document 0: -1 … 1"),
        ([], "0 documents"),
        ([[1], []], "2 documents"),
        ([[1], record([1, 2], [True, False])], "scored token"),
    ],
)
def test_unusable_documents_are_named(data, said):
    with pytest.raises(DataError, match=said):
        checked(*data)
