"""Margin and accuracy of a policy's reward, beside rules that need no model, and which side made the margin."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lit_did.audit.blocks import Table
from lit_did.audit.policy.scored import Scored
from lit_did.audit.policy.wording import with_half
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.statistics import mean_over_groups, ratio_over_groups, share_over_groups
from lit_did.audit.wording import NOTHING, cell, percent_between

LABELS = {
    "margin": "margin (nats)",
    "accuracy": "accuracy",
    "from_rejected": "share of the margin from lowering rejected completions",
}
_RULES = {"longer": "taking the longer side", "words": "a bag-of-words classifier, held out"}


def margin_figures(scored: Scored) -> dict[str, Estimate]:
    """Mean margin, accuracy, and the share of the margin that comes from lowering rejected completions."""
    return {
        "margin": mean_over_groups(scored.margin, scored.groups),
        "accuracy": share_over_groups(scored.right, scored.groups),
        "from_rejected": from_rejected(scored),
    }


def from_rejected(scored: Scored) -> Estimate:
    """- mean(log-ratio of rejected) / mean(margin), with Fieller's interval.

    Above 1 where chosen completions became less likely too, below 0 where rejected ones became more likely. It is NaN
    where the interval of the mean margin reaches 0, and where the mean margin is negative.
    """
    found = ratio_over_groups(-scored.rejected, scored.margin, scored.groups)
    unknown = math.isnan(found.lower) or scored.margin.mean() <= 0
    return Estimate(math.nan, count=found.count) if unknown else found


def margin_findings(scored: Scored, figures: Mapping[str, Estimate]) -> list[Finding]:
    """What the verdict says of margin and accuracy.

    Args:
        scored: The pairs.
        figures: From `margin_figures`.
    """
    margin, accuracy, lowered = figures["margin"], figures["accuracy"], figures["from_rejected"]
    prefers = Finding(
        "accuracy",
        f"The policy prefers the chosen side in {with_half(accuracy)} of the pairs; the mean margin is {margin} nats.",
        "",
        raised=False,
        severity=0.4,
        value=accuracy,
    )
    chosen, rejected = (float(values.mean()) for values in (scored.chosen, scored.rejected))
    if margin.upper < 0:
        sentence = f"On average the policy prefers the rejected side: the mean margin is {margin} nats."
    elif math.isnan(lowered.value):
        sentence = f"The mean margin is {margin} nats, which may be 0: which side made it cannot be said."
    elif lowered.lower > 1:
        sentence = (
            f"All of the margin, {percent_between(lowered)}, comes from lowering rejected completions: they fell by "
            f"{-rejected:.3g} nats, and chosen ones fell too, by {-chosen:.3g}."
        )
    elif lowered.upper < 0:
        raised = Estimate(1 - lowered.value, 1 - lowered.upper, 1 - lowered.lower, lowered.count)
        sentence = (
            f"All of the margin, {percent_between(raised)}, comes from raising chosen completions: they rose by "
            f"{chosen:.3g} nats, and rejected ones rose too, by {rejected:.3g}."
        )
    else:
        sentence = f"{percent_between(lowered)} of the margin comes from lowering rejected completions."
    advice = "Check that the two sides are not exchanged, in the data or in training." if margin.upper < 0 else ""
    severity = 1.0 if margin.upper < 0 else 0.5
    return [prefers, Finding("margin_side", sentence, advice, raised=False, severity=severity, value=lowered)]


def accuracy_table(
    scored: Scored,
    at_equal_length: Estimate,
    baselines: Mapping[str, Estimate],
    words_probability: np.ndarray | None,
) -> Table:
    """The policy's accuracy beside rules that need no model, with paired differences where there are any.

    Args:
        scored: The pairs.
        at_equal_length: The policy's accuracy at equal length.
        baselines: The accuracies of rules by name, over all pairs of the data.
        words_probability: [pairs] the chance that the label is right, of a bag-of-words classifier. NaN: unknown.
    """
    rules = {"longer": scored.longer}
    if words_probability is not None and np.isfinite(words_probability).any():
        rules["words"] = (np.sign(words_probability - 0.5) + 1) / 2
    rows: list[list] = [
        ["the policy", cell(share_over_groups(scored.right, scored.groups)), None],
        ["the policy, at equal length", cell(at_equal_length), None],
    ]
    for name in [*rules, *(name for name in baselines if name not in rules)]:
        right = rules.get(name)
        accuracy = baselines[name] if right is None else share_over_groups(right, scored.groups)
        ahead = None if right is None else cell(mean_over_groups(scored.right - right, scored.groups))
        rows.append([_RULES.get(name, name), accuracy, ahead])
    rows.append(["taking the longer side, at equal length", 0.5, None])
    return Table(
        "Accuracy beside rules that need no model",
        ["", "accuracy", "policy minus rule"],
        rows,
        note="At equal length: pairs count so that taking the longer side is right in exactly half of them. If the "
        "policy was trained on these pairs, its accuracy is in-sample: it also says how well the policy remembers "
        f"them. Then audit pairs that it has not seen. {NOTHING}",
    )
