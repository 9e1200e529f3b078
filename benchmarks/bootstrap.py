"""Two methods on the same seeds and texts: their difference, and how sure it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Effect(NamedTuple):
    """A method's perplexity less another's, and an interval that holds 95 % of what resampling gives."""

    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """In so many digits, the interval in brackets."""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def paired_bootstrap(
    ours: NDArray[Any], theirs: NDArray[Any], tokens: NDArray[Any], draws: int = 4000
) -> Effect:
    """The difference of two methods' perplexities, each the mean over seeds, with its interval.

    Seeds and documents are both drawn again, with replacement and the same ones for the two methods, so that
    what a seed or a document has in common for them drops out.

    Args:
        ours: losses of one method, summed over each document's tokens, [seeds, documents].
        theirs: those of the other.
        tokens: of each document, [documents].
        draws: how many times.

    Returns:
        The difference, and the 2.5th and 97.5th of 100 parts of what the draws give.

    Source: Efron and Tibshirani 1993, chapter 13; both ways at once, Owen 2007, "The pigeonhole bootstrap".
    """
    rng = np.random.default_rng(0)
    seeds, documents = ours.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    by_document = rng.multinomial(documents, np.full(documents, 1 / documents), draws)

    def perplexities(nll: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
        return np.exp(weights @ nll.T / (weights @ tokens)[:, None])  # [draws, seeds]

    drawn = perplexities(ours, by_document) - perplexities(theirs, by_document)
    low, high = np.percentile((by_seed * drawn).sum(1), [2.5, 97.5])
    whole = np.ones((1, documents))
    mean = (perplexities(ours, whole) - perplexities(theirs, whole)).mean()
    return Effect(float(mean), float(low), float(high))
