"""How sentences write counts and shares."""

from __future__ import annotations

import math

from lit_did.audit.report import Estimate
from lit_did.audit.statistics import MIN_PROMPTS

NOTHING = f"A dash: fewer than {MIN_PROMPTS} prompts, or a figure that is not defined."
"""what tables say of cells without a figure"""


def many(count: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> many(1, "pair"), many(2000, "pair")
        ('1 pair', '2,000 pairs')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share in percent, with two digits.

    Example:
        >>> percent(0.0312), percent(0.614)
        ('3.1%', '61%')
    """
    return f"{100 * share:.2g}%" if abs(share) < 0.995 else f"{100 * share:.0f}%"


def percent_between(estimate: Estimate) -> str:
    """A share in percent, with its interval.

    Example:
        >>> percent_between(Estimate(0.612, 0.5, 0.72, 900)), percent_between(Estimate(0.031, -0.002, 1.16, 30))
        ('61% (50% to 72%)', '3.1% (-0.2% to 116%)')
    """
    return f"{percent(estimate.value)} ({percent(estimate.lower)} to {percent(estimate.upper)})"


def cell(estimate: Estimate) -> Estimate | None:
    """What a table shows of a figure: nothing where there is too little data. `NOTHING` explains it.

    Example:
        >>> cell(Estimate(0.5, 0.1, 0.9, 6)), cell(Estimate(math.nan, count=30))
        (None, None)
    """
    return None if estimate.count < MIN_PROMPTS or math.isnan(estimate.value) else estimate
