"""Calibration: how often a policy is right where sigmoid(beta margin) says how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import special

from lit_did.audit.policy.scored import Scored
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.statistics import calibration_slope, share_over_groups, surely_below

LABELS = {"calibration_slope": "calibration slope"}
NUM_BINS, LEAST_IN_BIN = 10, 10
LARGEST_SLOPE, LEAST_ERROR = 0.8, 0.02
"""the flag "overconfident" needs a slope below the first, and a calibration error that exceeds chance by the second"""


class Reliability(NamedTuple):
    """A reliability curve over bins of equal counts, and the expected calibration error."""

    confidence: list[float]
    """by bin, the mean of sigmoid(beta |margin|)"""
    accuracy: list[Estimate]
    """by bin, the share of pairs whose chosen side is preferred"""
    counts: list[int]
    """by bin, its pairs"""
    error: float
    """the expected calibration error over bins of equal width, as `lit_did.functional.reward_calibration`"""
    by_chance: float
    """what it is on average for a calibrated policy with as many pairs"""


def reliability(scored: Scored) -> Reliability:
    """The reliability curve of sigmoid(beta margin), and its expected calibration error.

    A pair has no order of its sides, so every pair counts once: the confidence is that in the side that the policy
    prefers, from 1/2 to 1, and the accuracy how often that side is the chosen one.
    """
    confidence = special.expit(scored.beta * np.abs(scored.margin))
    count = max(1, min(NUM_BINS, len(scored) // LEAST_IN_BIN))
    parts = np.array_split(np.argsort(confidence, kind="stable"), count)
    bins = np.clip(np.ceil((2 * confidence - 1) * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(int)
    gaps = np.abs(np.bincount(bins, scored.right - confidence))
    deviations = np.sqrt(np.bincount(bins, confidence * (1 - confidence)))
    return Reliability(
        [float(confidence[part].mean()) for part in parts],
        [share_over_groups(scored.right[part], scored.groups[part]) for part in parts],
        [len(part) for part in parts],
        float(gaps.sum()) / len(scored),
        float(deviations.sum()) * math.sqrt(2 / math.pi) / len(scored),  # the mean of |x| of a normal x
    )


def calibration_figures(scored: Scored) -> dict[str, Estimate]:
    """k of sigmoid(k beta margin): 1 where the policy is calibrated, below 1 where it is too sure."""
    return {"calibration_slope": calibration_slope(scored.beta * scored.margin, scored.groups)}


def calibration_findings(scored: Scored, figures: Mapping[str, Estimate], curve: Reliability) -> list[Finding]:
    """The flag "overconfident".

    It is raised where the calibration slope is below 1 at the one-sided level .001 and below 0.8, and the expected
    calibration error is at least .02 above what chance gives.

    Args:
        scored: The pairs.
        figures: From `calibration_figures`.
        curve: From `reliability`.
    """
    slope = figures["calibration_slope"]
    raised = surely_below(slope, 1.0) and slope.value < LARGEST_SLOPE and curve.error - curve.by_chance >= LEAST_ERROR
    if raised:
        said = float(np.average(curve.confidence, weights=curve.counts))
        right = share_over_groups(scored.right, scored.groups)
        sentence = (
            f"The policy is surer than it is right: its mean confidence is {said:.2f}, its accuracy {right.value:.2f}, "
            f"and its calibration slope {slope}."
        )
    elif math.isnan(slope.value):
        sentence = "Every margin is 0, as with a policy that equals its reference: it has no calibration."
    elif math.isinf(slope.value):
        side = "chosen" if slope.value > 0 else "rejected"
        sentence = f"The policy prefers the {side} side of every pair: its calibration slope is not finite."
    else:
        sentence = f"The calibration slope of sigmoid(beta margin) is {slope}; 1 is calibrated."
    wrong = np.argsort(scored.margin, kind="stable")
    wrong = wrong[scored.margin[wrong] < 0] if raised else wrong[:0]
    return [
        Finding(
            "overconfident",
            sentence,
            "Train for fewer steps, with a higher beta or with label smoothing, and look for wrong labels."
            if raised
            else "",
            raised=raised,
            severity=min(1.0, max(0.0, 1 - slope.value)) if raised else 0.1,
            rows=scored.rows[wrong].tolist(),
            dropped=(),  # pairs that the policy gets wrong are not wrong pairs
            evidence={
                int(scored.rows[i]): f"It prefers the rejected side with confidence "
                f"{special.expit(-scored.beta * scored.margin[i]):.2f}."
                for i in wrong
            },
            value=slope,
        )
    ]
