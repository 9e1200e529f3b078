"""What a number in a setting stands for, so that a floor or a ceiling of it is exact."""

import itertools
import numbers
from fractions import Fraction
from typing import Any


def plain_number(value: Any) -> Any:
    """Python's number for numpy's, as a sweep over ``np.logspace`` gives; all else as it is.

    Example:
        >>> import numpy as np
        >>> plain_number(np.int64(5)), plain_number(np.float32(0.5)), plain_number("auto")
        (5, 0.5, 'auto')
    """
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def fraction(number: float) -> Fraction:
    """The number that was meant by a float: 29/100 by 0.29, one third by 1 / 3.

        the fraction with few digits in its denominator to which no float is closer

    A float is hardly ever the number that was typed: 0.29 · 100 is 28.999…, and its floor 28.

    Args:
        number: finite.

    Returns:
        The number as a fraction.

    Example:
        >>> fraction(0.29), fraction(1 / 3)
        (Fraction(29, 100), Fraction(1, 3))
    """
    exact = Fraction(float(number))
    near = (exact.limit_denominator(10**digits) for digits in itertools.count())
    return next(candidate for candidate in near if float(candidate) == number)
