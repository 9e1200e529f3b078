"""Training data of several sources, of which each has its share of the rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Documents of several sources, each with a weight: its share of the rows that a run draws.

        share of source i = wᵢ / Σⱼ wⱼ, to one percent of it

    Rows are those of a batch, of ``seq_len`` tokens, not those of a file. Each source is packed into rows of
    its own, so with packing the shares are those of the tokens too. The sources take turns as evenly as their
    shares allow, each in an order of its own, which every pass through it shuffles anew.

    An epoch ends when the first source is exhausted: in n epochs no row is drawn more than n times, and some
    rows of other sources may not be drawn.

    Args:
        sources: (documents, weight) of each; documents as the trainer takes them.

    Raises:
        ConfigError: there is no source, a weight is no positive number, or their ratios are beyond a float.

    Example:
        >>> chats, texts = [[1, 2, 3]], [[4, 5, 6], [7, 8, 9]]
        >>> Mixture([(chats, 0.7), (texts, 0.3)]).documents
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]]

    Source: ``grain.MapDataset.mix``.
    """

    sources: Sequence[tuple[Sequence[Any], float]]

    def __post_init__(self) -> None:
        sources = [([*documents], weight) for documents, weight in self.sources]  # which may be iterators
        object.__setattr__(self, "sources", sources)
        check_weights([weight for _, weight in sources])

    @property
    def documents(self) -> list[Any]:
        """Those of all sources, in order."""
        return [document for documents, _ in self.sources for document in documents]

    def of(self, documents: Sequence[TokenizedDocument]) -> Mixture:
        """The same shares of other documents, as many as there are."""
        remaining = iter(documents)
        return Mixture([([next(remaining) for _ in old], weight) for old, weight in self.sources])


def as_mixture(data: Sequence[Any] | Mixture) -> Mixture:
    """The mixture, or that of documents from one source."""
    return data if isinstance(data, Mixture) else Mixture([(data, 1)])


def check_weights(weights: Sequence[float]) -> None:
    """Raises a ConfigError for weights that give no shares, or where there are none."""
    wrong = [
        weight
        for weight in weights
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf
    ]
    if wrong or not weights:
        raise ConfigError(
            "A mixture must have sources, each with a weight that is a positive number.",
            f"weight {wrong[0]!r}" if wrong else "no source",
            "Leave out what shall have no share.",
        )
    if not math.isfinite(100 / min(weights) * max(weights)):  # to one percent of the smallest
        raise ConfigError(
            "The weights of a mixture must have ratios that a float can hold.",
            f"weights {min(weights)!r} and {max(weights)!r}",
            "Give parts of a whole, such as 0.7 and 0.3, and leave out what shall have no share.",
        )
