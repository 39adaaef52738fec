"""What the findings about rows share: counts in words, and the finding itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_did.audit.report import Estimate, Finding


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


def of_rows(
    name: str,
    what: str,
    none: str,
    advice: str,
    rows: Sequence[int],
    evidence: Mapping[int, str],
    total: int,
    *,
    dropped: Sequence[int] | None = None,
    least: float = 0.0,
) -> Finding:
    """A finding about rows.

    Args:
        name: Of the flag.
        what: What the rows do, after their number: "repeat an earlier pair".
        none: The sentence where there is no such row.
        advice: What to do with them.
        rows: Their numbers in the source.
        evidence: By row, what speaks for it.
        total: The number of all pairs.
        dropped: As of `Finding`.
        least: The share of pairs from which on the flag is raised.
    """
    share = len(rows) / max(1, total)
    what = what if len(rows) != 1 else _singular(what)
    sentence = f"{many(len(rows), 'pair')} of {total:,} ({percent(share)}) {what}." if len(rows) else none
    raised = bool(len(rows)) and share >= least
    value = Estimate(share, count=total)
    return Finding(name, sentence, advice if len(rows) else "", raised, share, rows, dropped, evidence, value)


def _singular(what: str) -> str:
    verb, _, rest = what.partition(" ")
    return f"{ {'have': 'has'}.get(verb, f'{verb}s') } {rest}".strip()
