"""Displacement: whether chosen completions became less likely while the margin grew."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lit_did.audit.policy.scored import Scored
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.statistics import mean_over_groups, share_over_groups, surely_above, surely_below
from lit_did.audit.wording import percent_between

LABELS = {
    "chosen_fell": "share of chosen completions that became less likely",
    "chosen_change": "change of the chosen log-likelihood (nats)",
    "rejected_change": "change of the rejected log-likelihood (nats)",
}
LARGEST_FALL = 0.1
"""nats, the limit of LitDPO's warning during training: such a completion is a tenth less likely"""
REASON = (
    "DPO's optimum itself lowers the likelihood of chosen completions on average where they come from the reference or "
    "from a model near it: their mean log-ratio is then -KL(rho, pi*). Sides that are nearly alike and a learning rate "
    "that is too high lower it too."
)


def displacement_figures(scored: Scored) -> dict[str, Estimate]:
    """The share of pairs whose chosen completion became less likely, and the mean changes of both sides."""
    return {
        "chosen_fell": share_over_groups(scored.chosen < 0, scored.groups),
        "chosen_change": mean_over_groups(scored.chosen, scored.groups),
        "rejected_change": mean_over_groups(scored.rejected, scored.groups),
    }


def displacement_findings(scored: Scored, figures: Mapping[str, Estimate]) -> list[Finding]:
    """The flag "displacement".

    It is raised where chosen completions fell by more than 0.1 nats on average while the mean margin is above 0, both
    at the one-sided level .001. A policy that only lost likelihood on both sides, such as one with noise on its
    weights, has no margin and is not flagged.

    Args:
        scored: The pairs.
        figures: From `displacement_figures`.
    """
    fell, change = figures["chosen_fell"], figures["chosen_change"]
    raised = surely_below(change, -LARGEST_FALL) and surely_above(mean_over_groups(scored.margin, scored.groups), 0.0)
    order = np.argsort(scored.chosen, kind="stable")
    order = order[scored.chosen[order] < 0] if raised else order[:0]
    return [
        Finding(
            "displacement",
            f"The chosen completion became less likely in {percent_between(fell)} of the pairs; the mean change "
            f"is {change} nats.",
            "If that is not wanted, add an SFT term (`nll_weight` of `LitDPO`, such as 0.2) or lower the learning rate."
            if raised
            else "",
            raised=raised,
            severity=fell.value if raised else 0.3,
            rows=scored.rows[order].tolist(),
            dropped=(),  # the advice is about training: the pairs are not wrong
            evidence={
                int(scored.rows[i]): f"The chosen log-likelihood changed by {scored.chosen[i]:.3g} nats, the rejected "
                f"one by {scored.rejected[i]:.3g}."
                for i in order
            },
            value=change,
        )
    ]
