"""Oracle: the model's plain logits, each sequence on its own, in float64."""

import numpy as np
import pytest

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.errors import DataError
from hylorada_jax.evaluation.lost_in_the_middle import LostInTheMiddle, evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity_test import VOCAB

SEQ_LEN = 12


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n) for n in (40, 7, 13, 12)]


def windows_and_nll(base):
    long, _, exact, _ = documents()
    windows = np.array([long[0:13], long[12:25], long[24:37], exact])
    logits = np.asarray(base(windows[:, :-1]).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return windows, -np.take_along_axis(log_p, windows[:, 1:, None], -1)[..., 0]


def test_losses_are_those_of_each_place_in_the_whole_windows(base):
    found = evaluate_lost_in_the_middle(base, documents(), seq_len=SEQ_LEN, batch_size=3, progress=False)
    _, nll = windows_and_nll(base)
    assert found.sequences == 4
    np.testing.assert_allclose(found.losses, nll.mean(0), rtol=1e-6)


def test_only_scored_tokens_count(base):
    texts = [TokenizedDocument(tokens, tokens % 3 > 0) for tokens in documents()]
    found = evaluate_lost_in_the_middle(base, texts, seq_len=SEQ_LEN, batch_size=3, progress=False)
    windows, nll = windows_and_nll(base)
    counts = windows[:, 1:] % 3 > 0
    np.testing.assert_array_equal(found.tokens, counts.sum(0))
    np.testing.assert_allclose(found.losses * found.tokens, (nll * counts).sum(0), rtol=1e-6)
    tenth = slice(0, 2)  # of 12 places
    mean = nll[:, tenth][counts[:, tenth]].mean()
    assert found.buckets[0] == pytest.approx(np.exp(mean), rel=1e-6)
    late = [TokenizedDocument(tokens, (np.arange(len(tokens)) - 1) % SEQ_LEN > 3) for tokens in documents()]
    with pytest.raises(DataError, match="part 1, 2 of 4 sequences"):
        evaluate_lost_in_the_middle(base, late, seq_len=SEQ_LEN, progress=False)


def test_the_measures_are_the_definitions():
    losses = np.log(np.arange(1.0, 31.0))
    found = LostInTheMiddle(losses, np.full(30, 5), 5)
    buckets = [np.exp(losses[3 * b : 3 * b + 3].mean()) for b in range(10)]
    np.testing.assert_allclose(found.buckets, buckets)
    assert found.perplexity == pytest.approx(np.mean(buckets))
    assert found.middle == pytest.approx(np.exp(losses[10:20].mean()))
    assert found.ends == pytest.approx(np.exp(np.concatenate([losses[:10], losses[20:]]).mean()))


def test_a_part_is_spread_over_all_sequences(base):
    long = np.random.default_rng(2).integers(0, VOCAB, 4 * SEQ_LEN + 1)
    part = evaluate_lost_in_the_middle(base, [long], seq_len=SEQ_LEN, max_tokens=2 * SEQ_LEN, progress=False)
    chosen = [long[start : start + SEQ_LEN + 1] for start in (0, 2 * SEQ_LEN)]
    first_and_third = evaluate_lost_in_the_middle(base, chosen, seq_len=SEQ_LEN, progress=False)
    np.testing.assert_allclose(part.losses, first_and_third.losses, rtol=1e-6)


def test_sequences_that_no_document_fills_are_refused(base):
    with pytest.raises(DataError, match="seq_len 40; the longest has 40 tokens"):
        evaluate_lost_in_the_middle(base, documents(), seq_len=40)


def test_scored_tokens_behind_the_whole_windows_are_not_enough(base):
    scored = np.arange(2 * SEQ_LEN + 5) > 2 * SEQ_LEN + 1
    document = TokenizedDocument(np.ones(len(scored), np.int32), scored=scored)
    for max_tokens in (None, SEQ_LEN):
        with pytest.raises(DataError, match="must have a scored token"):
            evaluate_lost_in_the_middle(base, [document], seq_len=SEQ_LEN, max_tokens=max_tokens)
