"""Intervals over prompts: against textbook formulas, a brute-force bootstrap, and by how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from lit_did.audit.report import Estimate
from lit_did.audit.statistics import (
    bootstrap,
    bootstrap_means,
    calibration_slope,
    mean_over_groups,
    rank_correlation,
    ratio_over_groups,
    share,
    share_over_groups,
    surely_above,
    surely_below,
)
from lit_did.functional.intervals import wilson


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coverage(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([found.lower <= truth <= found.upper for found in estimates]))


@pytest.mark.parametrize("count", [20, 40, 1000])
@pytest.mark.parametrize("p", [0.0009, 0.0011])
def test_surely_is_students_test_at_the_level_001(count, p):
    values = np.linspace(-1, 1, count)
    values += special.stdtrit(count - 1, 1 - p) * values.std(ddof=1) / math.sqrt(count)
    assert stats.ttest_1samp(values, 0.0, alternative="greater").pvalue == pytest.approx(p)
    assert surely_above(mean_over_groups(values, range(count)), 0.0) == (p < 0.001)
    assert surely_below(mean_over_groups(-values, range(count)), 0.0) == (p < 0.001)


def test_share_of_single_pairs_is_wilsons():
    hits = np.array([1.0] * 8 + [0.0] * 2)
    assert share_over_groups(hits, range(10)) == share(8, 10)


def test_share_of_repeated_pairs_counts_prompts():
    hits = (rng().random(60) < 0.7).astype(float)
    once, repeated = share(hits.sum(), 60), share_over_groups(np.repeat(hits, 5), np.repeat(range(60), 5))
    assert repeated.count == 60
    assert (repeated.lower, repeated.upper) == pytest.approx((once.lower, once.upper), abs=0.003)


def test_unknown_share_has_no_interval():
    assert all(map(math.isnan, wilson(math.nan, 10)))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_share_without_variation_has_an_interval(value):
    found = share_over_groups([value] * 40, np.repeat(range(20), 2))
    assert found == share(20 * value, 20)


def test_ratio_is_fiellers():
    x = rng().normal(1.0, 1.0, 50)
    y = rng(1).normal(2.0, 1.0, 50)
    found = ratio_over_groups(x, y, range(50))
    t = stats.t.ppf(0.975, 49)

    def statistic(ratio: float) -> float:
        residuals = x - ratio * y
        return float(residuals.mean() ** 2 - t**2 * residuals.var(ddof=1) / 50)

    expected = [optimize.brentq(statistic, found.value, found.value + s) for s in (-1.0, 1.0)]
    assert (found.value, found.lower, found.upper) == pytest.approx((x.mean() / y.mean(), *expected))


def test_ratio_to_about_nothing_has_no_interval():
    found = ratio_over_groups(np.ones(50), rng().normal(0.0, 1.0, 50), range(50))
    assert math.isnan(found.lower)


def test_bootstrap_by_brute_force():
    values, groups = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([7, 7, 3, 3, 9])
    [found] = bootstrap(lambda counts: [np.average(values, weights=counts)], groups, replicates=20000)
    members = [[2, 3], [0, 1], [4]]
    means = [
        np.mean(values[members[a] + members[b] + members[c]]) for a in range(3) for b in range(3) for c in range(3)
    ]
    assert found.value == values.mean()
    assert (found.lower, found.upper) == (min(means), max(means))  # their chance, 1 in 27, is above 2.5%
    assert found.count == 3


def test_bootstrap_means_agree_with_the_delta_method():
    values, weights = rng().normal(3.0, 1.0, (400, 2)), rng(1).integers(1, 30, (400, 2)).astype(float)
    values[:, 1] *= weights[:, 1]
    groups = np.repeat(range(200), 2)
    for column, found in enumerate(bootstrap_means(values, weights, groups)):
        expected = mean_over_groups(values[:, column], groups, weights[:, column])
        assert found.value == pytest.approx(expected.value)
        width = expected.upper - expected.lower
        assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper), abs=0.1 * width)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_bootstrap_means_leave_out_what_is_not_finite(broken):
    values = rng().normal(size=(50, 2))
    values[3, 0] = broken
    kept = np.delete(values[:, 0], 3).mean()
    found = bootstrap_means(values, np.ones((50, 2)), range(50))
    assert [x.value for x in found] == pytest.approx([kept, values[:, 1].mean()])
    assert np.isfinite(found[0]).all()


def test_correlation_is_spearmans_of_every_draw():
    x = rng().integers(0, 9, 80).astype(float)  # with ties
    y = x + rng(1).integers(0, 9, 80)
    found = rank_correlation(x, y, range(80), seed=3)
    assert found.value == pytest.approx(stats.spearmanr(x, y)[0])
    draws, generator = [], rng(3)
    for _ in range(500):
        drawn = generator.integers(80, size=80)
        draws.append(stats.spearmanr(x[drawn], y[drawn])[0])
    assert (found.lower, found.upper) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_correlation_with_a_constant_is_unknown():
    found = rank_correlation(np.ones(30), rng().normal(size=30), range(30))
    assert all(map(math.isnan, found[:3]))


def test_slope_is_the_maximum_of_the_likelihood():
    margins = rng().normal(0.5, 3.0, 300)
    found = calibration_slope(margins, range(300))
    best = optimize.minimize_scalar(lambda k: -special.log_expit(k * margins).sum(), (0.0, 1.0))
    assert found.value == pytest.approx(best.x, rel=1e-6)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, math.inf), (-1.0, -math.inf)])
def test_slope_of_margins_of_one_sign_is_infinite(sign, expected):
    assert calibration_slope(sign * np.arange(1.0, 9.0), range(8)).value == expected


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_slope_has_no_scale(scale):
    margins = rng().normal(0.5, 3.0, 100)
    found, scaled = calibration_slope(margins, range(100)), calibration_slope(margins * scale, range(100))
    assert np.array(scaled[:3]) * scale == pytest.approx(np.array(found[:3]))


def judged(seed: int, count: int = 150) -> np.ndarray:
    """Margins that sigmoid(margin / 2) calibrates."""
    generator = rng(seed)
    size = generator.normal(0.0, 3.0, count)
    return np.where(generator.random(count) < special.expit(size / 2), size, -size)


def test_intervals_cover():
    groups = np.repeat(range(75), 2)
    margins = [judged(seed) for seed in range(300)]
    slopes = [calibration_slope(margin, range(150)) for margin in margins]
    assert 0.92 <= coverage(slopes, 0.5) <= 0.98
    # Both pairs of a prompt are the same pair: only intervals over prompts cover.
    repeated = [calibration_slope(np.repeat(margin[:75], 2), groups) for margin in margins]
    assert 0.92 <= coverage(repeated, 0.5) <= 0.98
    right = float(special.expit(np.abs(rng(1).normal(0.0, 3.0, 10**6)) / 2).mean())
    shares = [share_over_groups(np.repeat(margin[:75] > 0, 2), groups) for margin in margins]
    assert 0.92 <= coverage(shares, right) <= 0.98


@pytest.mark.long
def test_bootstrap_intervals_cover():
    found = []
    for seed in range(300):
        x, noise = rng(seed).normal(size=(2, 60))
        found.append(rank_correlation(np.repeat(x, 2), np.repeat(x + noise, 2), np.repeat(range(60), 2)))
    truth = 6 / math.pi * math.asin(math.sqrt(0.5) / 2)
    assert 0.91 <= coverage(found, truth) <= 0.98


def test_beyond_a_limit():
    assert surely_above(Estimate(0.9, 0.7, 1.0), 0.5)
    assert not surely_above(Estimate(0.9, 0.52, 1.0), 0.5)
    assert surely_below(Estimate(0.1, 0.0, 0.3), 0.5)
    assert not surely_below(Estimate(0.1, 0.0, 0.48), 0.5)
    assert not surely_above(Estimate(0.9), 0.5)
