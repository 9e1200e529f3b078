"""Oracles: Student's interval of a mean, what pairing must cancel, and how often the truth is covered."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import paired_difference

RNG = np.random.default_rng(5)
TOKENS = RNG.integers(100, 200, 40)
LOSSES = RNG.normal(3, 0.3, (3, 40)) * TOKENS


def test_what_differs_nowhere_differs_by_nothing():
    assert paired_difference(LOSSES, LOSSES, TOKENS) == (0, 0, 0)


def test_a_constant_difference_of_losses_is_a_certain_factor():
    found = paired_difference(LOSSES + 0.1 * TOKENS, LOSSES, TOKENS)
    theirs = np.exp(LOSSES.sum(1) / TOKENS.sum()).mean()
    assert found.mean == pytest.approx(np.expm1(0.1) * theirs, rel=1e-12)
    # Of the factor nothing is left to chance, whatever perplexity it acts on.
    assert 0 < found.low <= found.mean <= found.high
    assert paired_difference(LOSSES, LOSSES + 0.1 * TOKENS, TOKENS).high < 0


def test_of_one_seed_the_interval_is_that_of_a_mean_over_documents():
    differences = RNG.normal(2e-6, 1e-5, 12)  # per token: so small that exp(x) − 1 is x
    found = paired_difference(differences[None] * 50, np.zeros((1, 12)), np.full(12, 50))
    expected = stats.t.interval(0.95, 11, differences.mean(), stats.sem(differences))
    assert found[1:] == pytest.approx(expected, rel=1e-4)


def test_what_differs_by_seed_alone_is_as_unsure_as_the_seeds():
    levels = np.array([0.0, 1.0, 0.4])
    found = paired_difference(levels[:, None] * np.ones((3, 5)), np.zeros((3, 5)), np.ones(5))
    values = np.expm1(levels)
    assert found[1:] == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))


@pytest.mark.parametrize(("by_seed", "by_document", "by_both"), [(4, 1, 1), (1, 8, 1), (4, 8, 4)])
def test_intervals_hold_the_truth_in_95_of_100_experiments(by_seed, by_document, by_both):
    rng, tokens, hits = np.random.default_rng(0), np.full(8, 100.0), 0
    theirs = np.full((3, 8), 300.0)
    for _ in range(1000):
        spreads = ((by_seed, (3, 1)), (by_document, (1, 8)), (by_both, (3, 8)))
        d = sum(rng.normal(0, spread, shape) for spread, shape in spreads)
        found = paired_difference(theirs + 1e-6 * d * tokens, theirs, tokens)
        hits += found.low <= 0 <= found.high
    # The share of 1,000 varies by 0.007, and the degrees of freedom are approximate.
    assert hits / 1000 == pytest.approx(0.95, abs=0.03)
