"""95% intervals of shares and of ratios of sums, in one place: for validation metrics, tables of scores and audits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

LEVEL = 0.95
Z = float(special.ndtri((1 + LEVEL) / 2))
Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Wilson's interval of a share of `count` independent cases, at least one.

    Example:
        >>> [round(end, 3) for end in wilson(0.5, 10)]
        [0.237, 0.763]
    """
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)  # in this order NaN stays NaN


def student(value: float, error: float, count: float) -> Interval:
    """Student's interval of a figure that comes from `count` independent units. NaN for fewer than two.

    Example:
        >>> [round(end, 3) for end in student(1.0, 0.1, 10)]
        [0.774, 1.226]
    """
    if count < 2:
        return math.nan, math.nan
    half = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    return value - half, value + half


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, Interval]:
    """sum(numerators) / sum(denominators) over independent units, linearised in the sums (the delta method).

    Args:
        numerators: [units].
        denominators: [units], such as 1 for each, or numbers of tokens.

    Returns:
        The ratio and Student's interval.

    Example:
        >>> ratio_of_sums([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])[0]
        2.0
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    count, total = len(above), below.sum()
    ratio = float(above.sum() / total)
    if count < 2:
        return ratio, (math.nan, math.nan)
    squares = float(np.square(above - ratio * below).sum())
    return ratio, student(ratio, math.sqrt(squares * count / (count - 1)) / float(total), count)
