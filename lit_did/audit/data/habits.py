"""Habits of formatting and phrasing that tell the sides apart: lists, headings, refusals, stock phrases and others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from lit_did.audit.data.length import length_bins, longer_is_chosen
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS, mean_over_groups, share_over_groups, surely_above, surely_below

SIZE = 0.1
"""how far a habit's accuracy is from 1/2, and surely how far by half from what length explains, to be a fault"""
COVERAGE = 0.02
"""the least share of pairs in which one side alone has the habit, to be a fault"""
LEVEL = 0.001
"""of Holm's test over all habits"""
NEAR = float(np.log(1.25))
"""the log of the ratio of lengths up to which sides are about equally long"""

_I = re.IGNORECASE


def _starts(phrases: str) -> re.Pattern[str]:
    return re.compile(rf"\s*(?:{phrases})\b", _I)


_SEARCHED = {
    "list": re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+\S", re.M),
    "numbered list": re.compile(r"^[ \t]*\d{1,3}[.)][ \t]+\S", re.M),
    "heading": re.compile(r"^#{1,6}[ \t]+\S", re.M),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
    "code block": re.compile(r"^[ \t]*```", re.M),
    "inline code": re.compile(r"(?<!`)`[^`\n]+`(?!`)"),
    "table": re.compile(r"^[ \t]*\|?[ \t]*:?-{3,}:?[ \t]*\|", re.M),
    "link": re.compile(r"https?://"),
    "emoji": re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]"),
    "exclamation mark": re.compile("!"),
    "question at the end": re.compile(r"\?\W*\Z"),
    "several paragraphs": re.compile(r"\S\n\s*\n\s*\S"),
    "refusal": re.compile(
        r"\bI(?:['’]m| am) (?:sorry|unable|not able|afraid)\b|\bI (?:cannot|can['’]t|won['’]t|will not)\b"
        r"|\bI apologi[sz]e\b",
        _I,
    ),
    "speaks as an AI": re.compile(
        r"\b(?:as|I['’]m|I am) an? (?:AI|artificial intelligence|(?:large )?language model)\b", _I
    ),
    "stock opening": _starts(
        r"certainly|sure|of course|absolutely|great question|good question|here (?:is|are)|here['’]s"
        r"|I['’]d be happy to|thank you for"
    ),
    "stock closing": re.compile(
        r"\bI hope (?:this|that|it) helps\b|\bhope (?:this|that) helps\b|\bin (?:conclusion|summary)\b|\bgood luck\b",
        _I,
    ),
    "offer to go on": re.compile(
        r"\blet me know\b|\bfeel free to\b|\bis there anything else\b|\bwould you like me to\b", _I
    ),
    "first person": re.compile(r"\bI\b|\bmy\b"),
    "speaks to the reader": re.compile(r"\byou(?:r|rs)?\b", _I),
    "hedging": re.compile(r"\b(?:perhaps|maybe|possibly|probably|might|it depends|generally|typically|seems?)\b", _I),
    "warning": re.compile(r"\b(?:it is|it['’]s) important to\b|\bconsult (?:a|an|your)\b|\bplease note\b", _I),
    "starts with no": _starts("no"),
    "starts with yes": _starts("yes"),
}
# "#", "```" and other marks that a text must have for its pattern to be searched, which is faster.
_NEEDS = {
    "heading": "#",
    "bold": "**",
    "code block": "```",
    "inline code": "`",
    "table": "---",
    "link": "://",
    "exclamation mark": "!",
    "question at the end": "?",
    "several paragraphs": "\n",
}
_AT_START = {"stock opening", "starts with no", "starts with yes"}
HABITS = tuple(_SEARCHED)
"""their names"""


class Habit(NamedTuple):
    """How well a habit predicts the chosen side."""

    name: str
    accuracy: Estimate
    """how often the side with the habit is the chosen one, where one side alone has it"""
    coverage: float
    """the share of pairs where one side alone has it"""
    near: Estimate
    """`accuracy` where both sides are about equally long"""
    beyond: Estimate
    """`accuracy` less what the lengths of these pairs alone would give"""
    p: float
    """of chance, after Holm's correction over all habits"""

    @property
    def is_fault(self) -> bool:
        """Whether chance and length do not explain it, and it is large enough to matter."""
        sign = 1 if self.accuracy.value > 0.5 else -1
        surely = surely_above(self.beyond, SIZE / 2) if sign > 0 else surely_below(self.beyond, -SIZE / 2)
        large = sign * (self.accuracy.value - 0.5) >= SIZE and self.coverage >= COVERAGE
        return large and surely and self.p < LEVEL and self.accuracy.count >= MIN_PROMPTS


def habits_of(text: str) -> list[bool]:
    """Whether a completion has each of `HABITS`."""
    return [_has(name, pattern, text) for name, pattern in _SEARCHED.items()]


def _has(name: str, pattern: re.Pattern[str], text: str) -> bool:
    if name in _NEEDS and _NEEDS[name] not in text:
        return False
    return (pattern.match if name in _AT_START else pattern.search)(text) is not None


def read_habits(data: AuditData, places: np.ndarray) -> np.ndarray:
    """[places, habits] int8: 1 where the chosen side alone has a habit, -1 where the rejected one has, else 0."""
    found = np.zeros((len(places), len(HABITS)), np.int8)
    for number, place in enumerate(places.tolist()):
        _, chosen, rejected = data.texts(place)
        found[number] = np.array(habits_of(chosen), np.int8) - np.array(habits_of(rejected), np.int8)
    return found


def rank_habits(signs: np.ndarray, ratios: np.ndarray, groups: np.ndarray) -> list[Habit]:
    """Every habit that tells the sides of some pair apart, the one that predicts best first.

    Args:
        signs: From `read_habits`.
        ratios: [pairs] log ratio of the lengths.
        groups: [pairs] the number of each prompt.
    """
    explained = _explained(ratios)
    found = []
    for name, sign in zip(HABITS, signs.T, strict=True):
        told = sign != 0
        if not told.any():
            continue
        hits = (sign[told] + 1) / 2
        near = told & (np.abs(ratios) <= NEAR)
        # The chance that the chosen side is the one with the habit, by which of both is longer.
        by_length = np.where(sign[told] > 0, explained[told], 1 - explained[told])
        found.append(
            Habit(
                name,
                share_over_groups(hits, groups[told]),
                float(told.mean()),
                share_over_groups((sign[near] + 1) / 2, groups[near]),
                mean_over_groups(hits - by_length, groups[told]),
                _chance(sign[told], groups[told]),
            )
        )
    found.sort(key=lambda habit: habit.p)
    worst, corrected = 0.0, []
    for rank, habit in enumerate(found):
        worst = max(worst, min(1.0, habit.p * (len(found) - rank)))
        corrected.append(habit._replace(p=worst))
    return sorted(corrected, key=lambda habit: -_evidence(habit.accuracy))


def read_habit(data: AuditData, name: str) -> np.ndarray:
    """[pairs] int8: one column of `read_habits`, of all pairs."""
    found = np.zeros(len(data), np.int8)
    for place in range(len(data)):
        _, *sides = data.texts(place)
        chosen, rejected = (_has(name, _SEARCHED[name], side) for side in sides)
        found[place] = chosen - rejected
    return found


def find_habits(data: AuditData, habits: Sequence[Habit], seed: int) -> Finding:
    """Whether a habit predicts the chosen side.

    Args:
        data: All pairs.
        habits: From `rank_habits`, of a sample of the pairs or of all.
        seed: Of the draw of the surplus.
    """
    faults = [habit for habit in habits if habit.is_fault]
    if not faults:
        return Finding(
            "habits",
            "No habit of formatting or phrasing surely predicts the chosen side beyond length.",
            "",
            False,
            0.0,
        )
    first = faults[0]
    signs, groups = read_habit(data, first.name), data.prompt_groups
    told = signs != 0
    accuracy = share_over_groups((signs[told] + 1) / 2, groups[told])
    coverage = float(told.mean())
    more = accuracy.value > 0.5
    shown = accuracy if more else Estimate(1 - accuracy.value, 1 - accuracy.upper, 1 - accuracy.lower, accuracy.count)
    others = (
        f"; so do {len(faults) - 1} other habits" if len(faults) > 2 else "; so does 1 other habit" * (len(faults) - 1)
    )
    sentence = (
        f'The habit "{first.name}" predicts the {"chosen" if more else "rejected"} side in {shown} of the '
        f"{coverage:.0%} of pairs where one side alone has it{others}."
    )
    with_it = np.flatnonzero(signs == (1 if more else -1))
    extra = 2 * len(with_it) - int(told.sum())
    places = np.sort(np.random.default_rng(seed).choice(with_it, extra, replace=False))
    side, rows = "chosen" if more else "rejected", data.row_numbers
    evidence = {int(row): f"The {side} side alone has: {first.name}." for row in rows[places]}
    return Finding(
        "habits",
        sentence,
        "Check that the habit is wanted, or leave out the flagged pairs, which balances it.",
        True,
        abs(2 * accuracy.value - 1) * coverage,
        rows[places].tolist(),
        None,
        evidence,
        accuracy,
    )


def _explained(ratios: np.ndarray) -> np.ndarray:
    """[pairs] the share of chosen sides among those that are as much longer, or shorter, than the other."""
    bins, longer = length_bins(ratios), longer_is_chosen(ratios)
    shares = np.bincount(bins, longer) / np.maximum(1, np.bincount(bins))
    share = shares[bins]
    return np.where(ratios > 0, share, np.where(ratios < 0, 1 - share, 0.5))


def _chance(sign: np.ndarray, groups: np.ndarray) -> float:
    """The p-value of a sign test over prompts: whether more of them have the habit in chosen sides than in rejected."""
    _, numbers = np.unique(groups, return_inverse=True)
    sums = np.bincount(numbers, sign)
    wins, losses = int((sums > 0).sum()), int((sums < 0).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _evidence(accuracy: Estimate) -> float:
    """How far from 1/2 the nearer end of an interval is; below 0 where it covers 1/2."""
    return max(accuracy.lower - 0.5, 0.5 - accuracy.upper)
