"""Each analysis of a policy against independent truth, and each flag with planted faults and with clean pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from lit_did.audit.policy.breakdown import by_value, figures_of
from lit_did.audit.policy.calibration import calibration_figures, calibration_findings, reliability
from lit_did.audit.policy.displacement import displacement_figures, displacement_findings
from lit_did.audit.policy.information import information_figures, information_findings, num_not_finite
from lit_did.audit.policy.length import balancing_weights, length_figures, length_findings
from lit_did.audit.policy.margins import accuracy_table, margin_figures, margin_findings
from lit_did.audit.policy.scored import Scored
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.statistics import mean_over_groups, share
from lit_did.functional import reward_calibration
from lit_did.ops import SequenceStatistics
from tests.audit.policy.planted import calibrated, follows_length, scored


def findings(pairs: Scored) -> dict[str, Finding]:
    """Of all topics, by name."""
    figures = figures_of(pairs)
    found = [
        *margin_findings(pairs, figures),
        *length_findings(pairs, figures),
        *displacement_findings(pairs, figures),
        *calibration_findings(pairs, figures, reliability(pairs)),
        *information_findings(figures),
    ]
    return {finding.name: finding for finding in found}


def raised(pairs: Scored) -> set[str]:
    return {name for name, finding in findings(pairs).items() if finding.raised}


def test_clean_pairs_raise_nothing():
    assert [seed for seed in range(20) if raised(calibrated(seed))] == []


def test_an_untrained_policy_raises_nothing():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, (2, 300))
    assert raised(scored(np.zeros(300), np.zeros(300), *lengths)) == set()
    assert raised(scored(*rng.normal(0, 1, (2, 300)), *np.sort(lengths, 0)[::-1])) == set()  # chosen is longer


# ---------------------------------------------------------------------------------------------------------- margin


def test_margin_and_accuracy():
    pairs = calibrated(1)
    found = margin_figures(pairs)
    assert found["accuracy"] == share(int((pairs.margin > 0).sum()), 400)
    t = stats.ttest_1samp(pairs.margin, 0.0).confidence_interval()
    assert (found["margin"].lower, found["margin"].upper) == pytest.approx((t.low, t.high))


def test_ties_count_half():
    assert margin_figures(scored([1.0] * 30, [1.0] * 30))["accuracy"].value == 0.5


@pytest.mark.parametrize(
    ("chosen", "rejected", "sentence"),
    [
        (4.0, -6.0, "60% (5"),
        (-1.0, -5.0, "comes from lowering rejected completions: they fell by 5 nats, and chosen ones fell too, by 1."),
        (6.0, 2.0, "comes from raising chosen completions: they rose by 6 nats, and rejected ones rose too, by 2."),
        (-0.05, -2.0, "103% (96% to 110%) of the margin comes from lowering rejected completions."),
        (2.0, 0.05, "-2.6% (-11% to 4.4%) of the margin comes from lowering rejected completions."),
        (1.0, 1.0, "which may be 0: which side made it cannot be said"),
        (-3.0, 3.0, "On average the policy prefers the rejected side"),
    ],
)
def test_which_side_made_the_margin(chosen, rejected, sentence):
    noise = np.random.default_rng(0).normal(0, 1, (2, 200))
    noise -= noise.mean(1, keepdims=True)
    pairs = scored(chosen + noise[0], rejected + noise[1])
    finding = findings(pairs)["margin_side"]
    assert sentence in finding.sentence
    if chosen > rejected:
        assert finding.value.value == pytest.approx(-rejected / (chosen - rejected))
        assert finding.value.lower < finding.value.value < finding.value.upper
    else:
        assert math.isnan(finding.value.value)


@pytest.mark.parametrize(
    ("chosen", "rejected", "start"),
    [(-1.0, -5.0, "All of the margin, 125% (12"), (6.0, 2.0, "All of the margin, 150% (1")],
)
def test_all_of_the_margin_has_an_interval(chosen, rejected, start):
    noise = np.random.default_rng(0).normal(0, 1, (2, 200))
    noise -= noise.mean(1, keepdims=True)
    finding = findings(scored(chosen + noise[0], rejected + noise[1]))["margin_side"]
    assert finding.sentence.startswith(start)


def test_accuracy_beside_rules():
    pairs = follows_length(0, follows=0.0)
    words = np.where(np.arange(400) % 4 == 0, 0.2, 0.9)
    words[0] = math.nan
    table = accuracy_table(pairs, Estimate(0.7, 0.6, 0.8, 400), {"longer": share(1, 2), "other": share(7, 10)}, words)
    rows = {row[0]: row[1:] for row in table.rows}
    accuracy, ahead = rows["taking the longer side"]
    hits = pairs.chosen_length > pairs.rejected_length
    assert accuracy == share(int(hits.sum()), 400)  # of the pairs that the policy scored
    assert ahead == mean_over_groups((pairs.margin > 0) * 1.0 - hits, range(400))
    assert rows["a bag-of-words classifier, held out"][0].value == pytest.approx(300 / 399)
    assert rows["other"] == [share(7, 10), None]
    assert rows["taking the longer side, at equal length"] == [0.5, None]


# ---------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_length_the_longer_side_is_right_in_half(seed):
    pairs = follows_length(seed, follows=0.5, longer_right=0.8)
    weights = balancing_weights(pairs.chosen_length, pairs.rejected_length)
    d = np.log(pairs.chosen_length + 0.5) - np.log(pairs.rejected_length + 0.5)
    assert np.average(pairs.longer, weights=weights) == pytest.approx(0.5)
    bins = np.digitize(np.abs(d), np.quantile(np.abs(d), np.arange(1, 10) / 10))
    for number in range(10):
        mine = bins == number
        assert np.average(d[mine] > 0, weights=weights[mine]) == pytest.approx(0.5)
    assert 0 <= weights.min() <= weights.max() <= 1


def test_a_bin_with_one_direction_has_no_weight():
    assert balancing_weights(np.array([20.0, 30.0]), np.array([10.0, 10.0])).tolist() == [0.0, 0.0]
    assert balancing_weights(np.array([7.0]), np.array([7.0])).tolist() == [0.5]
    assert balancing_weights(np.array([0.0]), np.array([0.0])).tolist() == [0.5]


def test_accuracy_at_equal_length():
    assert length_figures(follows_length(0, follows=1.0))["accuracy_at_equal_length"].value == pytest.approx(0.5)
    assert length_figures(follows_length(0, follows=1.0))["longer_preferred"].value == 1.0
    known = length_figures(follows_length(0, 4000, follows=0.0))
    assert known["accuracy_at_equal_length"].value == pytest.approx(2 / 3, abs=0.03)
    assert known["longer_preferred"].value == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shorter", [False, True])
def test_learned_length_is_flagged(shorter):
    pairs = follows_length(3, follows=0.9)
    if shorter:
        pairs = scored(pairs.chosen, pairs.rejected, pairs.rejected_length, pairs.chosen_length)
    finding = findings(pairs)["learned_length"]
    assert finding.raised
    assert finding.sentence.startswith(f"Taking the {'shorter' if shorter else 'longer'} side is right in .6")
    assert finding.sentence.endswith(": it may have learned length.")
    places = np.array(finding.rows) - 100
    assert len(places) > 50
    assert (pairs.margin[places] < 0).all()
    assert (np.diff(pairs.margin[places]) >= 0).all()
    assert ((pairs.longer[places] == 1) == shorter).all()
    assert finding.dropped == ()


@pytest.mark.parametrize(
    "options",
    [
        {"follows": 0.0},  # no better than the longer side, but for other reasons
        {"follows": 0.9, "longer_right": 0.5},  # follows length, which tells nothing
        {"follows": 0.05},
    ],
)
def test_learned_length_is_not_flagged(options):
    assert not any("learned_length" in raised(follows_length(seed, **options)) for seed in range(8))


def test_a_policy_that_is_better_than_length_is_not_flagged():
    pairs = follows_length(0, 1000, follows=1.0)  # right wherever the longer side is
    shorter = np.flatnonzero(pairs.longer == 0)[: int(0.75 * (pairs.longer == 0).sum())]
    chosen = pairs.chosen.copy()
    chosen[shorter] = pairs.rejected[shorter] + 1.0  # and in three of four other pairs
    better = scored(chosen, pairs.rejected, pairs.chosen_length, pairs.rejected_length)
    assert length_figures(better)["longer_preferred"].value > 0.6
    assert not findings(better)["learned_length"].raised


def test_few_pairs_do_not_flag_length():
    assert not any("learned_length" in raised(follows_length(seed, 25, follows=0.3)) for seed in range(8))


def test_reward_and_length_is_spearmans():
    pairs = follows_length(0, follows=0.7)
    expected = stats.spearmanr(pairs.margin, pairs.chosen_length - pairs.rejected_length)[0]
    assert length_figures(pairs)["reward_and_length"].value == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------- displacement


def test_displacement_is_flagged():
    noise = np.random.default_rng(0).normal(0, 2, (2, 200))
    pairs = scored(-1.5 + noise[0], -4.0 + noise[1])
    finding = findings(pairs)["displacement"]
    assert finding.raised
    fell = pairs.chosen < 0
    assert finding.rows == (100 + np.argsort(pairs.chosen)[: fell.sum()]).tolist()
    assert finding.severity == pytest.approx(fell.mean())
    assert finding.dropped == ()
    assert displacement_figures(pairs)["chosen_change"].value == pytest.approx(pairs.chosen.mean())


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (-0.05, -4.0),  # too small a fall
        (-1.5, -1.5),  # noise on the weights: there is no margin
        (1.0, -2.0),
    ],
)
def test_displacement_is_not_flagged(chosen, rejected):
    noise = np.random.default_rng(0).normal(0, 0.3, (2, 200))
    noise -= noise.mean(1, keepdims=True)
    finding = findings(scored(chosen + noise[0], rejected + noise[1]))["displacement"]
    assert (finding.raised, list(finding.rows)) == (False, [])


# ----------------------------------------------------------------------------------------------------- calibration


def test_slope_is_logistic_regressions():
    pairs = calibrated(2, scale=2.0)
    x = pairs.beta * np.concatenate([pairs.margin, -pairs.margin])[:, None]
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    regression.fit(x, np.repeat([1, 0], 400))
    assert calibration_figures(pairs)["calibration_slope"].value == pytest.approx(regression.coef_[0, 0], rel=1e-5)


def test_reliability_is_sklearns():
    pairs = calibrated(2)
    curve = reliability(pairs)
    confidence = 1 / (1 + np.exp(-pairs.beta * np.abs(pairs.margin)))
    accuracy, mean = calibration_curve(pairs.margin > 0, confidence, n_bins=10, strategy="quantile")
    assert curve.confidence == pytest.approx(mean.tolist())
    assert [found.value for found in curve.accuracy] == pytest.approx(accuracy.tolist())


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_calibration_error_is_the_metric(scale):
    pairs = calibrated(2, scale=scale)
    statistics = SequenceStatistics(*[torch.zeros(800)] * 10, num_tokens=torch.ones(800, dtype=torch.long))
    log_ratio = torch.from_numpy(np.concatenate([pairs.chosen, pairs.rejected]))
    expected = reward_calibration(statistics._replace(log_ratio=log_ratio), beta=0.1)
    assert reliability(pairs).error == pytest.approx(float(expected))


def test_calibration_error_by_chance():
    errors = [reliability(calibrated(seed)) for seed in range(60)]
    assert np.mean([curve.error for curve in errors]) == pytest.approx(errors[0].by_chance, rel=0.1)


def test_overconfidence_is_flagged():
    pairs = calibrated(4, scale=4.0)
    finding = findings(pairs)["overconfident"]
    assert finding.raised
    assert finding.value.value == pytest.approx(0.25, abs=0.06)
    assert finding.rows[0] == 100 + pairs.margin.argmin()
    assert len(finding.rows) == (pairs.margin < 0).sum()


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_overconfidence_is_not_flagged(scale):
    assert not any("overconfident" in raised(calibrated(seed, scale=scale)) for seed in range(8))


def test_a_small_excess_of_confidence_is_not_flagged():
    pairs = calibrated(0, 20000, scale=1.22)
    assert calibration_figures(pairs)["calibration_slope"].upper < 0.9
    assert not findings(pairs)["overconfident"].raised


def test_a_policy_that_is_always_right_has_no_finite_slope():
    finding = findings(scored(np.arange(1.0, 51.0), np.zeros(50)))["overconfident"]
    assert not finding.raised
    assert "prefers the chosen side of every pair" in finding.sentence


def test_a_policy_that_is_its_reference_has_no_calibration():
    finding = findings(scored(np.zeros(50), np.zeros(50)))["overconfident"]
    assert not finding.raised
    assert finding.sentence.startswith("Every margin is 0")


# ----------------------------------------------------------------------------------------------------- information


def test_information_is_the_mean_over_tokens():
    rng = np.random.default_rng(0)
    names = [f"{side}_{name}" for side in ("chosen", "rejected") for name in ("kl", "token_did_entropy")]
    given = {name: rng.exponential(1.0, 60) for name in names}
    given |= {f"{side}_num_tokens": rng.integers(1, 50, 60).astype(float) for side in ("chosen", "rejected")}
    given |= {"chosen_policy_entropy": np.full(60, 0.5), "rejected_policy_entropy": np.full(60, 0.5)}
    pairs = scored(np.zeros(60), np.zeros(60), groups=np.arange(60) // 2, **given)
    found = information_figures(pairs)
    tokens = np.concatenate([given["chosen_num_tokens"], given["rejected_num_tokens"]])
    for name in ("kl", "token_did_entropy"):
        values = np.concatenate([given[f"chosen_{name}"], given[f"rejected_{name}"]])
        expected = mean_over_groups(values, np.tile(pairs.groups, 2), tokens)
        assert found[name].value == pytest.approx(expected.value)
        width = expected.upper - expected.lower
        assert found[name][1:3] == pytest.approx(expected[1:3], abs=0.15 * width)
        assert found[name].count == 30
    assert found["entropy_change"].value == pytest.approx(-0.5)


@pytest.mark.parametrize(("change", "said"), [(-0.3, "reinforcing"), (0.3, "exploring"), (0.0, "neither")])
def test_between_reinforcing_and_exploring(change, said):
    entropy = 1.0 + change + np.random.default_rng(0).normal(0, 0.1, 100)
    pairs = scored(np.zeros(100), np.zeros(100), chosen_policy_entropy=entropy, rejected_policy_entropy=entropy)
    assert said in findings(pairs)["position"].sentence


def test_infinite_information_is_counted():
    kl = np.ones(40)
    kl[7] = math.inf
    pairs = scored(np.zeros(40), np.zeros(40), chosen_kl=kl)
    assert num_not_finite(pairs) == 1
    assert information_figures(pairs)["kl"][:3] == (1.0, 1.0, 1.0)


# --------------------------------------------------------------------------------------------------------- by value


def test_by_value():
    one, other = calibrated(0, 50), calibrated(1, 10)
    together = scored(
        np.concatenate([one.chosen, other.chosen]),
        np.concatenate([one.rejected, other.rejected]),
        np.concatenate([one.chosen_length, other.chosen_length]),
        np.concatenate([one.rejected_length, other.rejected_length]),
    )
    found = by_value(together, ["a"] * 50 + ["b"] * 10)
    assert list(found) == ["a", "b"]
    assert found["a"] == figures_of(one)
    assert all(math.isnan(figure.value) and figure.count == 10 for figure in found["b"].values())
    assert len(by_value(together, list(map(str, range(60))))) == 30
