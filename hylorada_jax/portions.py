"""Items in portions that are not too large."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def portions(items: Iterable[_Item], size_of: Callable[[_Item], int], most: int) -> Iterator[list[_Item]]:
    """The items in their order, as many at a time as are not too large together.

    Args:
        items: none is looked at before its portion is wanted.
        size_of: an item's size.
        most: the size of a portion, unless it is a single item.

    Example:
        >>> list(portions("aabcc", ord, 200)), list(portions([1, 5, 1, 1], int, 2))
        ([['a', 'a'], ['b', 'c'], ['c']], [[1], [5], [1, 1]])
    """
    portion: list[_Item] = []
    together = 0
    for item in items:
        size = size_of(item)
        if portion and together + size > most:
            yield portion
            portion, together = [], 0
        portion.append(item)
        together += size
    if portion:
        yield portion
