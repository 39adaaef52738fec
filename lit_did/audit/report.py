"""What an audit consists of: estimates, findings and parts, as plain data that any page, table or test can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lit_did.audit.blocks import Block

Column = Sequence[Any] | np.ndarray
"""a column of the table of pairs, with a value a pair"""

PARTS = ("data", "tokens", "reference", "policy", "sides")
"""the parts of an audit, in the order of the page"""


class Flag(NamedTuple):
    """Something that may be wrong, which `--fail_on` may name."""

    part: str
    """the part that looks for it, one of `PARTS`"""
    meaning: str
    """what it says of the data, in a few words"""
    of_rows: bool = True
    """whether single rows are wrong, and not the set as a whole, or the policy: these come first in the verdict"""


FLAGS = {
    "unusable": Flag("data", "rows that cannot be trained on, such as empty completions"),
    "identical": Flag("data", "pairs whose two sides are equal"),
    "duplicates": Flag("data", "pairs that repeat an earlier pair"),
    "near_duplicates": Flag("data", "pairs that nearly repeat an earlier pair"),
    "contradictions": Flag("data", "pairs that contradict other pairs of the same prompt"),
    "leaked": Flag("data", "pairs whose prompt is in the validation data too"),
    "empty_think": Flag("data", "completions with an empty think block"),
    "length_bias": Flag("data", "the longer, or the shorter, side is chosen more often than chance explains", False),
    "habits": Flag("data", "a habit of formatting or phrasing predicts the chosen side", False),
    "truncated": Flag("tokens", "completions that lose tokens to max_length"),
    "indistinct": Flag("reference", "pairs whose sides the reference can hardly tell apart"),
    "off_policy": Flag("reference", "completions that the reference would hardly write", False),
    "mislabelled": Flag("reference", "pairs whose sides seem to be swapped"),
    "displacement": Flag("policy", "chosen completions that became less likely", False),
    "learned_length": Flag("policy", "the policy is no better than taking the longer side", False),
    "overconfident": Flag("policy", "the policy's margins are larger than its accuracy warrants", False),
}
"""every flag by name"""


class Estimate(NamedTuple):
    """A figure with its 95% interval, whose ends are NaN where there is too little data for one."""

    value: float
    lower: float = math.nan
    upper: float = math.nan
    count: int = 0  # type: ignore[assignment]  # a field may hide the method of tuples
    """how many independent units, such as prompts, it comes from"""

    def __str__(self) -> str:
        if math.isnan(self.lower):
            return f"{self.value:.3g}"
        half = (self.upper - self.lower) / 2
        digits = min(6, max(0, 1 - math.floor(math.log10(half)))) if 0 < half < math.inf else 3
        return f"{self.value:.{digits}f} ({self.lower:.{digits}f} to {self.upper:.{digits}f})"


@dataclass(frozen=True)
class Finding:
    """Something that an audit found, for the verdict and the list of flags.

    Attributes:
        name: A key of `FLAGS`, or another name for what is worth knowing but is no fault.
        sentence: What was found, with its number and interval, as one sentence.
        advice: What to do, as one sentence in the imperative. "" if nothing is to be done.
        raised: Whether this is a fault. Only keys of `FLAGS` can be raised.
        severity: 0 to 1, which orders the findings of a kind. For faults of rows: their share of the rows.
        rows: The row numbers in the source that it is about, the worst first.
        dropped: The row numbers that the kept rows lack. None: `rows`.
        evidence: By row number, what speaks for it in that row, in a few words.
        value: Its number.
    """

    name: str
    sentence: str
    advice: str
    raised: bool
    severity: float
    rows: Sequence[int] = ()
    dropped: Sequence[int] | None = None
    evidence: Mapping[int, str] = field(default_factory=dict)
    value: Estimate | None = None


@dataclass
class Part:
    """What a part of an audit found.

    Attributes:
        name: One of `PARTS`.
        title: Its heading.
        introduction: What it measures, in one or two sentences.
        findings: What it found.
        blocks: What the page shows, in order. The rows of findings are added by the page.
        columns: Columns of the table of pairs, each with a value a pair, in the order of `AuditData.rows`.
        figures: Its numbers by name: plain values, dicts, lists and `Estimate`.
    """

    name: str
    title: str
    introduction: str
    findings: list[Finding] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
