"""Two methods on the same seeds and texts: their difference, and how sure it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

WORDS = "95 % intervals: Student's t, with errors over the seeds and, by the jackknife, over"
"""Of a table's caption; then comes what texts they are of."""


class Effect(NamedTuple):
    """A method's perplexity less another's, and an interval around the true one in 95 % of experiments."""

    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """In so many digits, the interval in brackets."""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def paired_difference(ours: NDArray[Any], theirs: NDArray[Any], tokens: NDArray[Any]) -> Effect:
    """The difference of two methods' perplexities, each the mean over seeds, with its interval.

        d = mean over seeds of exp(Σ ours / Σ tokens) − exp(Σ theirs / Σ tokens)
        d ± t·√(v₁ + v₂), v₁ the squared standard error over seeds, v₂ that over documents

    What a seed or a document has in common for the two methods drops out. t has Satterthwaite's degrees of
    freedom, (v₁ + v₂)² / (v₁² / (seeds − 1) + v₂² / (documents − 1)): three seeds say little of a fourth.

    Args:
        ours: losses of one method, summed over each document's tokens, [seeds, documents].
        theirs: those of the other.
        tokens: of each document, [documents].

    Returns:
        The difference and its interval; of one seed, or of one document, that part is unknown and left out.

    Source: Efron and Tibshirani 1993, chapter 11, the jackknife; Satterthwaite 1946, "An approximate
        distribution of estimates of variance components".
    """

    def difference(nll: NDArray[Any], other: NDArray[Any], counts: Any) -> NDArray[Any]:
        return np.exp(nll / counts) - np.exp(other / counts)

    of_ours, of_theirs = (losses.sum(1, keepdims=True) for losses in (ours, theirs))
    by_seed = difference(of_ours, of_theirs, tokens.sum())[:, 0]
    mean, (seeds, documents) = by_seed.mean(), ours.shape
    parts = []  # variances, and their degrees of freedom
    if seeds > 1:
        parts.append((by_seed.var(ddof=1) / seeds, seeds - 1))
    if documents > 1:
        # Without each document in turn.
        without = difference(of_ours - ours, of_theirs - theirs, tokens.sum() - tokens).mean(0)
        parts.append((without.var() * (documents - 1), documents - 1))
    variance = sum(value for value, _ in parts)
    if variance == 0:
        return Effect(float(mean), float(mean), float(mean))
    freedom = variance**2 / sum(value**2 / own for value, own in parts)
    half = stdtrit(freedom, 0.975) * math.sqrt(variance)
    return Effect(float(mean), float(mean - half), float(mean + half))
