"""Intervals of an audit's figures: shares, means over prompts, ratios, correlations, calibration slopes, and others."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from lit_did.audit.report import Estimate
from lit_did.functional.intervals import Z, ratio_of_sums, student, wilson

MIN_PROMPTS = 20
"""with fewer prompts a figure is not shown: there is too little data"""


def surely_above(estimate: Estimate, limit: float) -> bool:
    """Whether a figure is above a limit at the one-sided level .001, so that a dozen flags together rarely err.

    Example:
        >>> surely_above(Estimate(0.6, 0.55, 0.65), 0.5), surely_above(Estimate(0.6, 0.51, 0.69), 0.5)
        (True, False)
    """
    return estimate.value - limit > _sure(estimate.count) * (estimate.value - estimate.lower)


def surely_below(estimate: Estimate, limit: float) -> bool:
    """Whether a figure is below a limit at the one-sided level .001."""
    return limit - estimate.value > _sure(estimate.count) * (estimate.upper - estimate.value)


def _sure(count: int) -> float:
    """How far beyond a limit a figure must be for the one-sided level .001, in halves of its 95% interval.

    Student's quantiles of as many units, such as prompts. For intervals of Wilson or the bootstrap that is a little
    more than is needed.
    """
    if count < 2:  # not known: a normal figure
        return float(special.ndtri(0.999)) / Z
    return float(special.stdtrit(count - 1, 0.999) / special.stdtrit(count - 1, 0.975))


def share(hits: float, count: float) -> Estimate:
    """A share of independent cases, with Wilson's interval.

    Example:
        >>> print(share(8, 10))
        0.80 (0.49 to 0.94)
    """
    if not count:
        return Estimate(math.nan)
    return Estimate(hits / count, *wilson(hits / count, count), round(count))


def share_over_groups(hits: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> Estimate:
    """The weighted share of pairs that are hits, with Wilson's interval over prompts.

    Where prompts have several pairs, or pairs weights, Wilson's interval is that of as many independent pairs as would
    vary as much.

    Args:
        hits: [pairs] 0, 1, or 1/2 for a tie. Pairs whose value is NaN are left out.
        groups: [pairs] the number of each pair's prompt.
        weights: [pairs]. None: all 1.
    """
    hit = np.asarray(hits, dtype=float)
    weight = np.ones(len(hit)) if weights is None else np.asarray(weights, dtype=float)
    known = np.isfinite(hit) & (weight > 0)
    mean = mean_over_groups(hit, groups, weight)
    if weights is None and mean.count == known.sum():  # one pair a prompt
        return share(float(hit[known].sum()), mean.count)
    if not mean.count:
        return mean
    error = (mean.upper - mean.lower) / 2 / float(special.stdtrit(max(1, mean.count - 1), 0.975))
    if error > 1e-12:
        effective = max(1.0, mean.value * (1 - mean.value) / error**2)
    else:
        _, numbers = np.unique(np.asarray(groups)[known], return_inverse=True)
        sums = np.bincount(numbers, weight[known])
        effective = float(sums.sum() ** 2 / np.square(sums).sum())
    return share(mean.value * effective, effective)._replace(value=mean.value, count=mean.count)


def mean_over_groups(values: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> Estimate:
    """A weighted mean over pairs, with Student's interval over prompts: pairs of one prompt are not independent.

    The mean is linearised in the sums of each group (`ratio_of_sums`).

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
    _, numbers = np.unique(np.asarray(groups)[known], return_inverse=True)
    totals = np.bincount(numbers, weight)
    mean, interval = ratio_of_sums(np.bincount(numbers, weight * value), totals)
    return Estimate(mean, *interval, len(totals))


def ratio_over_groups(numerator: ArrayLike, denominator: ArrayLike, groups: ArrayLike) -> Estimate:
    """The ratio of two means over pairs, with Fieller's interval over prompts.

    The interval is NaN where the 95% interval of the denominator reaches 0: then the ratio may be any number.

    Args:
        numerator: [pairs], finite.
        denominator: [pairs], finite.
        groups: [pairs] the number of each pair's prompt.
    """
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(numbers, np.asarray(x, dtype=float)) for x in (numerator, denominator)])
    count = sums.shape[1]
    if not count or not sums[1].sum():
        return Estimate(math.nan, count=count)
    above, below = sums.mean(1)
    ratio = float(above / below)
    if count < 2:
        return Estimate(ratio, count=count)
    (v11, v12), (_, v22) = np.cov(sums) / count * float(special.stdtrit(count - 1, 0.975)) ** 2
    leading = below**2 - v22
    discriminant = (above * below - v12) ** 2 - leading * (above**2 - v11)
    if leading <= 0 or discriminant < 0:
        return Estimate(ratio, count=count)
    middle, half = (above * below - v12) / leading, math.sqrt(discriminant) / leading
    return Estimate(ratio, float(middle - half), float(middle + half), count)


def bootstrap(
    statistic: Callable[[np.ndarray], ArrayLike], groups: ArrayLike, *, replicates: int = 500, seed: int = 0
) -> list[Estimate]:
    """Figures with percentile intervals of the bootstrap over prompts: all pairs of a prompt are drawn together.

    Args:
        statistic: Of how often each pair counts, float64 [pairs], the figures. A figure of a draw that is NaN is left
            out of its interval.
        groups: [pairs] the number of each pair's prompt.
        replicates: How many draws.
        seed: Of the draws.

    Example:
        >>> values = np.arange(40.0)
        >>> [mean] = bootstrap(lambda weights: [np.average(values, weights=weights)], range(40))
        >>> print(mean)
        19.5 (15.8 to 22.9)
    """
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    count = int(numbers.max()) + 1 if len(numbers) else 0
    whole = np.atleast_1d(np.asarray(statistic(np.ones(len(numbers))), dtype=float)) if count else np.array([math.nan])
    if count < 2:
        return [Estimate(float(value), count=count) for value in whole]
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [
            np.atleast_1d(statistic(np.bincount(rng.integers(count, size=count), minlength=count)[numbers] * 1.0))
            for _ in range(replicates)
        ]
    )
    found = []
    for value, drawn in zip(whole, draws.T, strict=True):
        kept = drawn[np.isfinite(drawn)]
        ends = np.quantile(kept, [0.025, 0.975]) if len(kept) else (math.nan, math.nan)
        found.append(Estimate(float(value), float(ends[0]), float(ends[1]), count))
    return found


def bootstrap_means(values: ArrayLike, weights: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> list[Estimate]:
    """Weighted means over pairs with percentile intervals of the bootstrap over prompts.

    Args:
        values: [pairs, figures]. What is not finite is left out of its figure.
        weights: [pairs, figures], such as numbers of tokens.
        groups: [pairs] the number of each pair's prompt.
        seed: Of the draws.
    """
    value, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    known = np.isfinite(value)
    sums, totals = np.where(known, value, 0) * np.where(known, weight, 0), np.where(known, weight, 0)

    def means(counts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (counts @ sums) / (counts @ totals)

    return bootstrap(means, groups, seed=seed)


def rank_correlation(first: ArrayLike, second: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> Estimate:
    """Spearman's correlation, with the percentile interval of the bootstrap over prompts. Every draw is ranked anew.

    Args:
        first: [pairs], finite.
        second: [pairs], finite.
        groups: [pairs] the number of each pair's prompt.
        seed: Of the draws.
    """
    places = [np.unique(np.asarray(values, dtype=float), return_inverse=True)[1] for values in (first, second)]

    def correlation(counts: np.ndarray) -> list[float]:
        ranks = []
        for place in places:
            of_value = np.bincount(place, counts)
            ranks.append((np.cumsum(of_value) - of_value / 2)[place])
        centred = [rank - np.average(rank, weights=counts) for rank in ranks]
        (xx, xy), (_, yy) = [[float(np.sum(counts * a * b)) for b in centred] for a in centred]
        return [xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan]

    return bootstrap(correlation, groups, seed=seed)[0]


def calibration_slope(margins: ArrayLike, groups: ArrayLike) -> Estimate:
    """k of sigmoid(k margin), the chance that the chosen side is the better one: maximum likelihood, with an interval.

    There is no constant, because the sides of a pair have no order. The interval is Student's, with the variance over
    prompts (the sandwich), so it holds where prompts have several pairs, and where no k is right. k is 1 where
    sigmoid(margin) is calibrated, and below 1 where the margins are too large. It is infinite where all margins have
    one sign.

    Args:
        margins: [pairs] finite log-odds.
        groups: [pairs] the number of each pair's prompt.

    Example:
        >>> slope = calibration_slope([3.0, 3.0, 3.0, -3.0], range(4)).value
        >>> round(slope * 3.0, 6), round(math.log(3), 6)  # right in 3 of 4
        (1.098612, 1.098612)
    """
    margin = np.asarray(margins, dtype=float)
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    count, scale = int(numbers.max()) + 1 if len(numbers) else 0, float(np.abs(margin).max()) if len(margin) else 0.0
    if not scale:
        return Estimate(math.nan, count=count)
    x = margin / scale
    if (x >= 0).all() or (x <= 0).all():
        return Estimate(math.copysign(math.inf, x.sum()), count=count)
    k = 0.0
    for _ in range(200):
        miss = special.expit(-k * x)
        gradient, curvature = float(x @ miss), float(np.square(x) @ (miss * (1 - miss)))
        # A step is at most what doubles k, so that it cannot leave the region where the curvature is above 0.
        step = float(np.clip(gradient / curvature, -1 - abs(k), 1 + abs(k))) if curvature else -k / 2
        k += step
        if abs(step) <= 1e-12 * max(1.0, abs(k)):
            break
    miss = special.expit(-k * x)
    curvature = float(np.square(x) @ (miss * (1 - miss)))
    scores = np.bincount(numbers, x * miss)
    error = math.sqrt(float(np.square(scores).sum()) * count / max(1, count - 1)) / curvature
    return Estimate(k / scale, *student(k / scale, error / scale, count), count)


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
