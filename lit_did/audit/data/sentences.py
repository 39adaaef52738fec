"""What the findings about rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_did.audit.report import Estimate, Finding
from lit_did.audit.wording import many, percent


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
