"""What the findings about rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_did.audit.report import Estimate, Finding
from lit_did.audit.wording import many, percent


def of_rows(
    name: str,
    what: str,
    none: str,
    advice: tuple[str, str],
    rows: Sequence[int],
    evidence: Mapping[int, str],
    total: int,
    *,
    dropped: Sequence[int] | None = None,
    least: float = 0.0,
    left_out: str = "",
) -> Finding:
    """A finding about rows.

    Args:
        name: Of the flag.
        what: What the rows do, after their number: "repeat an earlier pair".
        none: The sentence where there is no such row, without its end.
        advice: What to do with one row, and with several.
        rows: Their numbers in the source.
        evidence: By row, what speaks for it.
        total: The number of all pairs.
        dropped: As of `Finding`.
        least: The share of pairs from which on the flag is raised.
        left_out: What the sentence ends with: which pairs were not looked at.
    """
    share = len(rows) / max(1, total)
    what = what if len(rows) != 1 else _singular(what)
    sentence = f"{many(len(rows), 'pair')} of {total:,} ({percent(share)}) {what}" if len(rows) else none
    raised = bool(len(rows)) and share >= least
    value = Estimate(share, count=total)
    what_to_do = advice[len(rows) > 1] if raised else ""
    return Finding(name, f"{sentence}{left_out}.", what_to_do, raised, share, rows, dropped, evidence, value)


def _singular(what: str) -> str:
    verb, _, rest = what.partition(" ")
    return f"{ {'have': 'has'}.get(verb, f'{verb}s') } {rest}".strip()
