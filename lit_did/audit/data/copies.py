"""Rows that cannot be used, identical sides, exact duplicates, and contradictions."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lit_did.audit.data.keys import Keys, first_of, in_order
from lit_did.audit.data.sentences import of_rows
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.source import AuditData
from lit_did.audit.wording import many, percent

LEAST_COPIES = 0.001
"""the share of pairs from which on (near) duplicates are a fault: fewer do no harm"""
_NAMED = 5  # rows that evidence names


def find_unusable(data: AuditData) -> Finding:
    """The rows that the reader refused."""
    rows, total = [row.index for row in data.skipped], data.num_rows
    if not rows:
        return Finding("unusable", f"All {total:,} rows can be trained on.", "", False, 0.0)
    [(reason, count)] = Counter(row.reason for row in data.skipped).most_common(1)
    which = "The reason" if count == len(rows) else f"The most frequent reason, of {count:,},"
    reason = reason.rstrip(".")
    verb = "cannot be trained on and " + ("is" if len(rows) == 1 else "are") + " left out"
    sentence = f"{many(len(rows), 'row')} of {total:,} ({percent(len(rows) / total)}) {verb}. {which} is: {reason}."
    evidence = {row.index: row.reason for row in data.skipped}
    share = len(rows) / total
    return Finding(
        "unusable", sentence, "Fix or remove them.", True, share, rows, None, evidence, Estimate(share, count=total)
    )


def find_identical(data: AuditData, keys: Keys) -> Finding:
    """Pairs whose sides differ in whitespace at most."""
    places = np.flatnonzero(keys.chosen == keys.rejected)
    rows = data.row_numbers[places].tolist()
    evidence = {}
    for place, row in zip(places.tolist(), rows, strict=True):
        pair = data.rows[place].pair
        equal = pair.chosen == pair.rejected
        evidence[row] = "The sides are equal." if equal else "The sides differ in whitespace alone."
    return of_rows(
        "identical",
        "have two sides that are equal or differ in whitespace alone",
        "No pair has identical sides.",
        "Remove them: they hold no preference.",
        rows,
        evidence,
        len(data),
    )


def find_duplicates(data: AuditData, keys: Keys) -> tuple[Finding, np.ndarray]:
    """Pairs that repeat an earlier one but for whitespace, and [pairs] bool: whether a pair does."""
    first = first_of(in_order(np.stack([keys.prompt, keys.chosen, keys.rejected], 1)))
    is_copy = first != np.arange(len(first))
    rows, originals = data.row_numbers[is_copy].tolist(), data.row_numbers[first[is_copy]].tolist()
    finding = of_rows(
        "duplicates",
        "repeat an earlier pair",
        "No pair repeats another one.",
        "Remove the copies.",
        rows,
        {row: f"Repeats row {original}." for row, original in zip(rows, originals, strict=True)},
        len(data),
        least=LEAST_COPIES,
    )
    return finding, is_copy


def find_contradictions(data: AuditData, keys: Keys) -> Finding:
    """Pairs of one prompt that no ranking of its completions agrees with: swapped sides, and longer cycles.

    The completions of a prompt and the preferences between them make a directed graph. The pairs within a strongly
    connected component are those on a cycle. To break all cycles, completions of a component are ranked by the pairs
    that they win less those that they lose, and at a tie by which came first. Pairs against this ranking are dropped.
    """
    prompts = in_order(keys.prompt)
    ends = np.concatenate([np.stack([prompts, keys.chosen], 1), np.stack([prompts, keys.rejected], 1)])
    # The chosen side of a pair comes before its rejected one.
    nodes = in_order(ends.reshape(2, -1, 2).swapaxes(0, 1).reshape(-1, 2)).reshape(-1, 2)
    winners, losers = nodes.T
    distinct = winners != losers
    edges = coo_array((np.ones(distinct.sum()), (winners[distinct], losers[distinct])), shape=(nodes.max() + 1,) * 2)
    component = connected_components(edges, connection="strong")[1]
    on_cycle = np.flatnonzero(distinct & (component[winners] == component[losers]))
    surplus = np.zeros(nodes.max() + 1, np.int64)
    np.add.at(surplus, winners[on_cycle], 1)
    np.add.at(surplus, losers[on_cycle], -1)
    better = (surplus[winners] > surplus[losers]) | ((surplus[winners] == surplus[losers]) & (winners < losers))
    rows = data.row_numbers[on_cycle].tolist()
    opposite: dict[tuple[int, int], list[int]] = {}
    cycle: dict[int, list[int]] = {}
    for place, row in zip(on_cycle.tolist(), rows, strict=True):
        opposite.setdefault((int(losers[place]), int(winners[place])), []).append(row)
        cycle.setdefault(int(component[winners[place]]), []).append(row)
    evidence = {}
    for place, row in zip(on_cycle.tolist(), rows, strict=True):
        if swapped := opposite.get((int(winners[place]), int(losers[place]))):
            evidence[row] = f"The sides are swapped in {_named(swapped, row)}."
        else:
            evidence[row] = f"It makes a cycle with {_named(cycle[int(component[winners[place]])], row)}."
    return of_rows(
        "contradictions",
        "contradict other pairs of the same prompt",
        "No pair contradicts another one.",
        "Keep one of each.",
        rows,
        evidence,
        len(data),
        dropped=data.row_numbers[on_cycle[~better[on_cycle]]].tolist(),
    )


def _named(rows: list[int], but: int) -> str:
    few = [row for row in rows[: _NAMED + 2] if row != but]
    more = ", ..." if len(few) > _NAMED else ""
    return f"{'row' if len(few) == 1 else 'rows'} {', '.join(map(str, few[:_NAMED]))}{more}"
