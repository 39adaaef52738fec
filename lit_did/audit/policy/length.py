"""Whether a policy learned length: its accuracy where length carries no information, and what it takes at that."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lit_did.audit.policy.scored import Scored
from lit_did.audit.policy.wording import decimal, with_half
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.statistics import (
    mean_over_groups,
    rank_correlation,
    share_over_groups,
    surely_above,
)

LABELS = {
    "accuracy_at_equal_length": "accuracy at equal length",
    "longer_preferred": "share of longer sides preferred, at equal length",
    "reward_and_length": "rank correlation of reward and length",
}
NUM_BINS, LEAST_IN_BIN = 10, 10
LEAST_PREFERRED = 0.6
"""a policy that takes the longer side more often than this, where it is right in half of the pairs, follows length"""


def balancing_weights(chosen_length: np.ndarray, rejected_length: np.ndarray) -> np.ndarray:
    """Weights of pairs under which length carries no information: the longer side is right in exactly half.

    With d = log(chosen length / rejected length), pairs are put into up to ten bins of |d| with equal counts. A pair
    weighs the share of the pairs of its bin whose d has the other sign. So the two signs weigh the same in every bin:
    n+ n- / (n+ + n-). Pairs of equal length weigh 1/2.

    Args:
        chosen_length: [pairs], not negative.
        rejected_length: [pairs], not negative.

    Example:
        >>> balancing_weights(np.array([2, 2, 2, 1]), np.array([1, 1, 1, 2])).tolist()
        [0.25, 0.25, 0.25, 0.75]
    """
    d = np.log((np.asarray(chosen_length) + 0.5) / (np.asarray(rejected_length) + 0.5))
    weights = np.full(len(d), 0.5)
    differ = d != 0
    size = np.abs(d[differ])
    count = max(1, min(NUM_BINS, len(size) // LEAST_IN_BIN))
    edges = np.quantile(size, np.arange(1, count) / count) if len(size) else []
    bins, positive = np.searchsorted(edges, size, side="right"), d[differ] > 0
    total, above = np.bincount(bins, minlength=count), np.bincount(bins, positive, minlength=count)
    share = (above / np.maximum(total, 1))[bins]
    weights[differ] = np.where(positive, 1 - share, share)
    return weights


def length_figures(scored: Scored) -> dict[str, Estimate]:
    """Accuracy at equal length, the share of longer sides preferred at it, and the correlation of reward and length."""
    weights = balancing_weights(scored.chosen_length, scored.rejected_length)
    differ = scored.longer != 0.5
    prefers_longer = np.where(scored.longer == 1, scored.right, 1 - scored.right)
    return {
        "accuracy_at_equal_length": share_over_groups(scored.right, scored.groups, weights),
        "longer_preferred": share_over_groups(prefers_longer[differ], scored.groups[differ], weights[differ]),
        "reward_and_length": rank_correlation(
            scored.margin, scored.chosen_length - scored.rejected_length, scored.groups
        ),
    }


def length_findings(scored: Scored, figures: Mapping[str, Estimate]) -> list[Finding]:
    """The flag "learned_length".

    It is raised where all of these hold, each at the one-sided level .001 where it is a test:
    - length predicts the label: the longer side, or the shorter one, is right in more than half of the pairs;
    - the policy is not significantly better than that rule (paired, over prompts);
    - at equal length, where the rule is right in half of the pairs, the policy still takes the side that the rule takes
      in significantly more than half of them, and in at least 60%.

    Args:
        scored: The pairs.
        figures: From `length_figures`.
    """
    longer = share_over_groups(scored.longer, scored.groups)
    accuracy = share_over_groups(scored.right, scored.groups)
    takes, rule, right = figures["longer_preferred"], "longer", scored.longer
    if longer.value < 0.5:
        rule, right = "shorter", 1 - scored.longer
        takes = Estimate(1 - takes.value, 1 - takes.upper, 1 - takes.lower, takes.count)
    rule_right = share_over_groups(right, scored.groups)
    ahead = mean_over_groups(scored.right - right, scored.groups)
    balanced = figures["accuracy_at_equal_length"]
    raised = (
        surely_above(rule_right, 0.5)
        and not surely_above(ahead, 0.0)
        and surely_above(takes, 0.5)
        and takes.value >= LEAST_PREFERRED
    )
    if raised:
        sentence = (
            f"Taking the {rule} side is right in {decimal(rule_right.value)}, your policy in {with_half(accuracy)}: "
            "it may have learned length."
        )
    else:
        sentence = (
            f"Taking the {rule} side is right in {decimal(rule_right.value)}, your policy in {with_half(accuracy)}, "
            f"and in {with_half(balanced)} at equal length."
        )
    # Where the policy followed length into a mistake.
    wrong = (scored.right < 0.5) & (right < 0.5)
    rows = scored.rows[wrong][np.argsort(scored.margin[wrong], kind="stable")].tolist() if raised else []
    return [
        Finding(
            "learned_length",
            sentence,
            "Balance the lengths of chosen and rejected completions, or train with a loss per token." if raised else "",
            raised=raised,
            severity=min(1.0, max(0.0, 2 * takes.value - 1)) if raised else 0.2,
            rows=rows,
            dropped=(),  # without these pairs, length would predict the label even better
            evidence=dict.fromkeys(rows, f"The policy prefers the {rule} side, which is the rejected one."),
            value=balanced,
        )
    ]
