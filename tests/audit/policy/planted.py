"""Constructed statistics of pairs, with a fault or without, for tests that need no models."""

from __future__ import annotations

import numpy as np
from scipy import special

from lit_did.audit.policy.scored import INFORMATION, SIDES, Scored


def scored(chosen, rejected, chosen_length=None, rejected_length=None, groups=None, **info) -> Scored:
    """Pairs with these log-ratios. Lengths are 10 and information is 1 unless it is given by "SIDE_STATISTIC"."""
    chosen, rejected = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    count = len(chosen)
    ones = np.ones(count)
    return Scored(
        rows=100 + np.arange(count),
        groups=np.arange(count) if groups is None else np.asarray(groups),
        chosen=chosen,
        rejected=rejected,
        chosen_length=10 * ones if chosen_length is None else np.asarray(chosen_length, dtype=float),
        rejected_length=10 * ones if rejected_length is None else np.asarray(rejected_length, dtype=float),
        num_tokens={side: info.get(f"{side}_num_tokens", 10 * ones) for side in SIDES},
        information={f"{s}_{name}": info.get(f"{s}_{name}", ones) for s in SIDES for name in INFORMATION},
    )


def calibrated(seed: int, count: int = 400, *, scale: float = 1.0, chosen: float = 0.5) -> Scored:
    """A calibrated policy whose margins have nothing to do with length, multiplied by `scale`.

    Args:
        seed: Of the draws.
        count: Pairs, one a prompt.
        scale: 1 is calibrated; above it the policy is too sure.
        chosen: The share of the margin that comes from raising the chosen side.
    """
    rng = np.random.default_rng(seed)
    size = rng.normal(0.0, 15.0, count)
    margin = scale * np.where(rng.random(count) < special.expit(0.1 * size), size, -size)
    lengths = rng.integers(5, 200, (2, count))
    return scored(chosen * margin, (chosen - 1) * margin, *lengths)


def follows_length(seed: int, count: int = 400, *, follows: float, longer_right: float = 0.64) -> Scored:
    """Pairs whose longer side is right in a share `longer_right`.

    Args:
        seed: Of the draws.
        count: Pairs.
        follows: The share of pairs in which the policy takes the longer side. In the others it knows the right one
            with a chance of 2 in 3.
        longer_right: See above.
    """
    rng = np.random.default_rng(seed)
    short = rng.integers(5, 100, count)
    long = short + rng.integers(1, 100, count)
    longer = rng.random(count) < longer_right
    right = np.where(rng.random(count) < follows, longer, rng.random(count) < 2 / 3)
    margin = np.where(right, 1.0, -1.0) * rng.exponential(5.0, count)
    return scored(margin / 2, -margin / 2, np.where(longer, long, short), np.where(longer, short, long))
