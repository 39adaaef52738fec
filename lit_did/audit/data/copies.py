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
    advice = f"Fix or remove {'it' if len(rows) == 1 else 'them'}."
    return Finding("unusable", sentence, advice, True, share, rows, None, evidence, Estimate(share, count=total))


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
        "No pair has identical sides",
        ("Remove it: it holds no preference.", "Remove them: they hold no preference."),
        rows,
        evidence,
        len(data),
    )


def find_duplicates(data: AuditData, keys: Keys) -> tuple[Finding, np.ndarray]:
    """Pairs that repeat an earlier one but for case and whitespace, and [pairs] bool: whether a pair does."""
    first = first_of(in_order(np.stack([keys.prompt, keys.chosen, keys.rejected], 1)))
    is_copy = first != np.arange(len(first))
    numbers = data.row_numbers.tolist()
    copies = {place: int(first[place]) for place in np.flatnonzero(is_copy).tolist()}
    finding = of_rows(
        "duplicates",
        "repeat an earlier pair",
        "No pair repeats another one",
        ("Remove the copy.", "Remove the copies."),
        [numbers[place] for place in copies],
        {
            numbers[
                place
            ]: f"Repeats {data.called(numbers[original])}{_but(data.texts(place) != data.texts(original))}."
            for place, original in copies.items()
        },
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
    for place in on_cycle.tolist():
        opposite.setdefault((int(losers[place]), int(winners[place])), []).append(place)
        cycle.setdefault(int(component[winners[place]]), []).append(place)
    evidence = {}
    for place, row in zip(on_cycle.tolist(), rows, strict=True):
        if swapped := opposite.get((int(winners[place]), int(losers[place]))):
            prompt, chosen, rejected = data.texts(place)
            differs = all(data.texts(other) != (prompt, rejected, chosen) for other in swapped)
            evidence[row] = f"The sides are swapped in {_named(data, swapped, place)}{_but(differs)}."
        else:
            evidence[row] = f"It makes a cycle with {_named(data, cycle[int(component[winners[place]])], place)}."
    return of_rows(
        "contradictions",
        "contradict other pairs of the same prompt",
        "No pair contradicts another one",
        ("", "Keep one of each."),
        rows,
        evidence,
        len(data),
        dropped=data.row_numbers[on_cycle[~better[on_cycle]]].tolist(),
    )


def _named(data: AuditData, places: list[int], but: int) -> str:
    few = [data.called(data.rows[place].index) for place in places[: _NAMED + 2] if place != but]
    return ", ".join(few[:_NAMED]) + (", ..." if len(few) > _NAMED else "")


def _but(differs: bool) -> str:
    return ", but for case, whitespace or marks around the prompt" if differs else ""
