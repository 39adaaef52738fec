"""How sentences write counts and shares."""

from __future__ import annotations


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
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"
