"""Intervals of an audit's figures: shares, means over prompts, areas under the curve and calibration slopes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from lit_did.audit.report import Estimate

Z = float(special.ndtri(0.975))


def share(hits: float, count: int) -> Estimate:
    """A share of independent cases, with Wilson's interval.

    Example:
        >>> print(share(8, 10))
        0.80 (0.49 to 0.94)
    """
    if not count:
        return Estimate(math.nan)
    value = hits / count
    middle = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2))
    return Estimate(value, max(0.0, middle - half), min(1.0, middle + half), count)


def mean_over_groups(values: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> Estimate:
    """A weighted mean over pairs, with Student's interval over prompts: pairs of one prompt are not independent.

    The mean is linearised in the sums of each group (the delta method).

    Args:
        values: [pairs]. Pairs whose value is NaN are left out.
        groups: [pairs] the number of each pair's prompt.
        weights: [pairs], such as numbers of tokens. None: all 1.
    """
    value = np.asarray(values, dtype=float)
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, dtype=float)
    known = np.isfinite(value) & (weight > 0)
    value, weight = value[known], weight[known]
    if not len(value):
        return Estimate(math.nan)
    mean = float(np.average(value, weights=weight))
    _, numbers = np.unique(np.asarray(groups)[known], return_inverse=True)
    residuals = np.bincount(numbers, weight * (value - mean)) / weight.sum()
    count = len(residuals)
    if count < 2:
        return Estimate(mean, count=count)
    error = math.sqrt(float(np.square(residuals).sum()) * count / (count - 1))
    half = float(special.stdtrit(count - 1, 0.975)) * error
    return Estimate(mean, mean - half, mean + half, count)


def area_under_curve(scores: ArrayLike, positive: ArrayLike) -> float:
    """The chance that a positive case has a higher score than a negative one; ties count half.

    Example:
        >>> area_under_curve([1.0, 2.0, 3.0], [False, True, True])
        1.0
    """
    ranks, is_positive = stats.rankdata(scores), np.asarray(positive, dtype=bool)
    wins, losses = int(is_positive.sum()), int((~is_positive).sum())
    if not wins or not losses:
        return math.nan
    return float((ranks[is_positive].sum() - wins * (wins + 1) / 2) / (wins * losses))
