"""How the sentences about a policy write numbers."""

from __future__ import annotations

import math

from lit_did.audit.report import Estimate
from lit_did.audit.statistics import MIN_PROMPTS

NOTHING = f"A dash: fewer than {MIN_PROMPTS} prompts, or a figure that is not defined."
"""what tables say of cells without a figure"""


def decimal(value: float) -> str:
    """A share without the 0 before the point.

    Example:
        >>> decimal(0.638)
        '.64'
    """
    return f"{value:.2f}".removeprefix("0")


def with_half(estimate: Estimate) -> str:
    """A share and half of its interval.

    Example:
        >>> with_half(Estimate(0.66, 0.63, 0.69, 900))
        '.66 ± .03'
    """
    if math.isnan(estimate.lower):
        return decimal(estimate.value)
    return f"{decimal(estimate.value)} ± {decimal((estimate.upper - estimate.lower) / 2)}"


def cell(estimate: Estimate) -> Estimate | None:
    """What a table shows of a figure: nothing where there is too little data. `NOTHING` explains it.

    Example:
        >>> cell(Estimate(0.5, 0.1, 0.9, 6)), cell(Estimate(math.nan, count=30))
        (None, None)
    """
    return None if estimate.count < MIN_PROMPTS or math.isnan(estimate.value) else estimate
