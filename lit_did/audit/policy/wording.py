"""How the sentences about a policy write numbers."""

from __future__ import annotations

import math

from lit_did.audit.report import Estimate


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
