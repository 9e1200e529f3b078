"""Laws: every prediction counts once, in a row of its own document; and hypothesis looks for exceptions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.packing import Rows, batches, best_fit, spread
from hylorada_jax.models.batch import KEYS

lengths = st.lists(st.integers(0, 40), max_size=12)
masks = st.lists(st.lists(st.booleans(), max_size=40), max_size=12)


def numbered(lengths, masks=None, **structure):
    """Documents whose tokens are all different, so that a token says where it stood, and what it is."""
    starts = np.cumsum([0, *lengths])
    tokens = [np.arange(start, start + n, dtype=np.int32) for start, n in zip(starts, lengths, strict=False)]
    scored = [None] * len(tokens) if masks is None else [np.array(mask, bool) for mask in masks]
    return [
        TokenizedDocument(ids, mask, **{name: of(ids) for name, of in structure.items()})
        for ids, mask in zip(tokens, scored, strict=True)
    ]


@given(lengths, st.integers(1, 9), st.data(), st.booleans())
def test_every_prediction_counts_exactly_once_with_its_own_context(lengths, seq_len, data, packing):
    stride = data.draw(st.integers(1, seq_len))
    documents = numbered(lengths)
    rows = Rows(documents, seq_len, stride=stride, packing=packing)
    scored = []
    for i in range(len(rows)):
        row = rows[i]
        counted = row["targets"] >= 0
        scored += row["targets"][counted].tolist()
        # The target follows its input, and the inputs of a segment follow each other.
        assert (row["targets"][counted] == row["input_ids"][counted] + 1).all()
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            assert (np.diff(np.flatnonzero(inside)) == 1).all()
            assert (np.diff(row["input_ids"][inside]) == 1).all()
            # With a stride, a prediction past the first window has seq_len − stride tokens or more before it.
            first_counted = np.flatnonzero(inside & counted)[0] - np.flatnonzero(inside)[0]
            begins_document = row["input_ids"][inside][0] in {int(d.tokens[0]) for d in documents if len(d)}
            assert begins_document or first_counted == seq_len - stride
        assert packing or row["segment_ids"].max() == 1
        assert (row["targets"][row["segment_ids"] == 0] == -1).all()
    assert sorted(scored) == [int(token) for document in documents for token in document.tokens[1:]]


@given(masks, st.integers(1, 9), st.data(), st.booleans())
def test_every_scored_prediction_counts_exactly_once_and_no_other(masks, seq_len, data, packing):
    stride = data.draw(st.integers(1, seq_len))
    lengths = [len(mask) for mask in masks]
    documents = numbered(lengths, masks)
    rows = list(Rows(documents, seq_len, stride=stride, packing=packing))
    assert all((row["targets"] >= 0).any() for row in rows)
    counted = sorted(int(target) for row in rows for target in row["targets"] if target >= 0)
    # The oracle: token i of a document is predicted from the one before it.
    assert counted == [
        int(document.tokens[i])
        for document, mask in zip(documents, masks, strict=True)
        for i in range(1, len(mask))
        if mask[i]
    ]
    # What is not scored is still read: windows are the whole text's, without those where nothing counts.
    plain = Rows(numbered(lengths), seq_len, stride=stride, packing=False)
    expected = []
    for row in plain:
        targets = [t if t in counted else -1 for t in row["targets"].tolist()]
        if max(targets) >= 0:
            expected.append((row["input_ids"].tolist(), targets))
    if not packing:
        assert [(row["input_ids"].tolist(), row["targets"].tolist()) for row in rows] == expected
    assert sum(int(row["segment_ids"].max()) for row in rows) == len(expected)


@given(lengths, st.integers(1, 9), st.data(), st.booleans())
def test_every_packed_token_has_the_structure_id_of_its_source(lengths, seq_len, data, packing):
    # An id that a token's own number tells, whatever its place in a row; never 0, which is padding's.
    documents = numbered(lengths, structure_ids=lambda tokens: tokens * 7 % 61 + 1)
    stride = data.draw(st.integers(1, seq_len))
    rows = Rows(documents, seq_len, stride=stride, packing=packing)
    plain = Rows(numbered(lengths), seq_len, stride=stride, packing=packing)
    for batch, without in zip(batches(rows, 2), batches(plain, 2), strict=True):
        ids = batch.pop("structure_ids")
        expected = np.where(batch["segment_ids"] > 0, batch["input_ids"] * 7 % 61 + 1, 0)
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == np.int32
        # Nothing else of a row depends on it, and without structure there is no such name.
        assert batch.keys() == without.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], without[name])


@given(lengths, st.integers(1, 9), st.data(), st.booleans())
def test_every_packed_token_has_the_structure_position_of_its_source(lengths, seq_len, data, packing):
    # Like an id above; a half is not an integer, and a float32 has it exactly.
    documents = numbered(lengths, structure_positions=lambda tokens: tokens * 7 + 0.5)
    stride = data.draw(st.integers(1, seq_len))
    rows = Rows(documents, seq_len, stride=stride, packing=packing)
    for batch in batches(rows, 2):
        expected = np.where(batch["segment_ids"] > 0, batch["input_ids"] * 7 + 0.5, 0)
        np.testing.assert_array_equal(batch["structure_positions"], expected)
        assert batch["structure_positions"].dtype == np.float32
        assert "structure_ids" not in batch


def test_rows_and_what_fills_them_up_are_as_the_table_of_keys_says():
    fields = {name: lambda tokens: tokens + 1 for name in ("structure_ids", "structure_positions")}
    (batch,) = batches(Rows(numbered([3, 2], **fields), 4), 3)
    assert batch.keys() == KEYS.keys() - {"row"}
    for name, values in batch.items():
        assert values.dtype == KEYS[name].dtype
        np.testing.assert_array_equal(values[0, 3:], KEYS[name].pad)
        np.testing.assert_array_equal(values[1:], KEYS[name].pad)
    np.testing.assert_array_equal(batch["document_ids"][0], [0, 0, 1, 0])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_places_every_piece_and_overfills_no_row(lengths):
    rows = best_fit(lengths, 20)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    filled = [sum(lengths[piece] for piece in row) for row in rows]
    assert all(0 < n <= 20 for n in filled)
    # Two rows that are at most half full would have been one: no fitting algorithm leaves them.
    assert sum(n <= 10 for n in filled) <= 1


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    documents = [TokenizedDocument(np.ones(n, np.int32)) for n in rng.integers(2, 300, 400)]
    rows = Rows(documents, 128)
    tokens = sum(len(d) - 1 for d in documents)
    # Many pieces of all sizes leave less than 1 % of padding, where a row for each piece leaves a third.
    assert len(rows) <= tokens / 128 * 1.01 + 1
    assert len(Rows(documents, 128, packing=False)) > 1.3 * len(rows)


def test_batches_have_every_row_once_and_one_shape():
    rows = Rows(numbered([7, 7, 7, 7, 7]), 6)
    all_batches = list(batches(rows, 2))
    assert [batch["input_ids"].shape for batch in all_batches] == [(2, 6)] * 3
    stacked = np.concatenate([batch["targets"] for batch in all_batches])
    np.testing.assert_array_equal(stacked[:5], np.stack([rows[i]["targets"] for i in range(5)]))
    assert (stacked[5] == -1).all()
    (some,) = batches(spread(rows, 10), 2)  # two rows of 6: the first, and one from the middle
    np.testing.assert_array_equal(some["input_ids"], np.stack([rows[i]["input_ids"] for i in (0, 2)]))


def test_padding_is_not_counted_where_some_tokens_are_taken():
    rows = Rows(numbered([5] * 40), 16, packing=False)  # 4 tokens each have a next one
    assert rows.tokens == 160
    for these in (rows, list(rows)):
        assert [len(spread(these, tokens)) for tokens in (40, 1, 10**9)] == [10, 1, 40]


@pytest.mark.parametrize("lengths", [[], [0], [1]])
def test_nothing_to_predict_makes_no_row(lengths):
    assert len(Rows(numbered(lengths), 4)) == 0
