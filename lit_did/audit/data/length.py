"""Length: how often the longer side is chosen, and a surplus of pairs whose removal makes both equally frequent."""

from __future__ import annotations

import numpy as np

from lit_did.audit.report import Estimate, Finding
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS, share_over_groups, surely_above, surely_below
from lit_did.audit.wording import many

BIAS = 0.05
"""how far from 1/2 the accuracy of "take the longer side" is surely beyond for a length bias"""


def log_ratios(lengths: np.ndarray) -> np.ndarray:
    """[pairs] log of the length of the chosen over that of the rejected side.

    Args:
        lengths: [pairs, 2] numbers of words.
    """
    return np.log((lengths[:, 0] + 1) / (lengths[:, 1] + 1))


def length_bins(ratios: np.ndarray) -> np.ndarray:
    """[pairs] the bin of each pair by how much the lengths of its sides differ; bins have about equally many pairs."""
    sizes = np.abs(ratios)
    count = int(np.clip(len(ratios) / 100, 1, 10))
    edges = np.quantile(sizes, np.arange(1, count) / count) if len(sizes) else np.empty(0)
    return np.searchsorted(edges, sizes, side="right")


def longer_is_chosen(ratios: np.ndarray) -> np.ndarray:
    """[pairs] 1 where the chosen side is longer, 0 where it is shorter, 1/2 where both are equally long."""
    return (np.sign(ratios) + 1) / 2


def surplus(ratios: np.ndarray, seed: int) -> np.ndarray:
    """The places of pairs without which, in each bin, as many chosen sides are longer as are shorter."""
    bins, rng, found = length_bins(ratios), np.random.default_rng(seed), []
    for number in np.unique(bins):
        longer, shorter = (np.flatnonzero((bins == number) & (sign * ratios > 0)) for sign in (1, -1))
        more, fewer = (longer, shorter) if len(longer) > len(shorter) else (shorter, longer)
        found.append(rng.choice(more, len(more) - len(fewer), replace=False))
    places = np.concatenate(found) if found else np.empty(0, np.int64)
    return places[np.argsort(-np.abs(ratios[places]), kind="stable")]


def find_length_bias(data: AuditData, ratios: np.ndarray, groups: np.ndarray, seed: int) -> Finding:
    """Whether the longer, or the shorter, side is chosen more often than chance explains."""
    hits = np.where(ratios == 0, np.nan, longer_is_chosen(ratios))
    accuracy = share_over_groups(hits, groups)
    if accuracy.count < MIN_PROMPTS:
        sentence = f"The sides differ in length in {many(accuracy.count, 'prompt')}, too few for a length bias."
        return Finding("length_bias", sentence, "", False, 0.0, value=accuracy)
    above, below = surely_above(accuracy, 0.5 + BIAS), surely_below(accuracy, 0.5 - BIAS)
    shown = 1 - accuracy.value if below else accuracy.value
    ends = (1 - accuracy.upper, 1 - accuracy.lower) if below else accuracy[1:3]
    which = "shorter" if below else "longer"
    sentence = (
        f"The {which} side is chosen in {Estimate(shown, *ends, accuracy.count)} of the pairs whose lengths differ."
    )
    if not (above or below):
        return Finding("length_bias", sentence, "", False, 0.0, value=accuracy)
    places = surplus(ratios, seed)
    rows = data.row_numbers[places].tolist()
    evidence = {
        row: f"The chosen side has {np.exp(ratio):.2f} times the words of the rejected one."
        for row, ratio in zip(rows, ratios[places].tolist(), strict=True)
    }
    too_many = 2 * len(rows) > len(ratios)
    mend = f"Leave out the {many(len(rows), 'flagged pair')}, which balances the lengths"
    if too_many:
        mend = f"Add pairs whose {'longer' if below else 'shorter'} side is chosen"
    advice = f"{mend}, or use a loss that corrects for length."
    dropped = () if too_many else None  # so few would be left that they make no data set
    severity = abs(2 * accuracy.value - 1)
    return Finding("length_bias", sentence, advice, True, severity, rows, dropped, evidence, accuracy)
