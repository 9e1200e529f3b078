"""Oracles: the closed form of a mean's standard error, and what pairing must cancel."""

import numpy as np
import pytest

from benchmarks.bootstrap import paired_bootstrap

RNG = np.random.default_rng(5)
TOKENS = RNG.integers(100, 200, 40)
LOSSES = RNG.normal(3, 0.3, (3, 40)) * TOKENS


def test_what_differs_nowhere_differs_by_nothing():
    assert paired_bootstrap(LOSSES, LOSSES, TOKENS) == (0, 0, 0)


def test_a_constant_difference_of_losses_is_a_certain_factor():
    found = paired_bootstrap(LOSSES + 0.1 * TOKENS, LOSSES, TOKENS)
    theirs = np.exp(LOSSES.sum(1) / TOKENS.sum()).mean()
    assert found.mean == pytest.approx(np.expm1(0.1) * theirs, rel=1e-12)
    # Of the factor nothing is left to chance, whatever perplexity it acts on.
    assert 0 < found.low <= found.mean <= found.high
    assert paired_bootstrap(LOSSES, LOSSES + 0.1 * TOKENS, TOKENS).high < 0


def test_of_one_seed_the_interval_is_that_of_a_mean():
    tokens = np.full(400, 50)
    differences = RNG.normal(0.02, 0.1, 400)  # per token, of documents
    theirs = np.zeros((1, 400))
    low, high = paired_bootstrap(theirs + differences * tokens, theirs, tokens)[1:]
    half = 1.96 * differences.std(ddof=1) / 20
    # exp(mean) - 1; 4,000 draws leave a few parts of 100 to chance.
    assert low == pytest.approx(np.expm1(differences.mean() - half), abs=0.05 * half)
    assert high == pytest.approx(np.expm1(differences.mean() + half), abs=0.05 * half)


def test_what_differs_by_seed_alone_is_as_unsure_as_the_seeds():
    level = np.array([[0.0], [1.0]])
    found = paired_bootstrap(level * np.ones((2, 3)), np.zeros((2, 3)), np.ones(3))
    assert found == pytest.approx((np.expm1(1) / 2, 0, np.expm1(1)))
