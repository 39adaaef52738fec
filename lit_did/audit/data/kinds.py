"""Tables of the kinds of pairs: by tag, by every column with few values, and by the number of turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_did.audit.blocks import Table
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import share_over_groups
from lit_did.audit.wording import NOTHING, cell

MOST_VALUES = 20
"""a column with more values than this is not shown"""


def tables_of_kinds(
    data: AuditData, lengths: np.ndarray, longer: np.ndarray, right: np.ndarray, groups: np.ndarray
) -> list[Table]:
    """A table a column: of each value, the pairs, the lengths, and how well length and words predict the label.

    Args:
        data: The pairs.
        lengths: [pairs, 3] words of prompt, chosen and rejected.
        longer: [pairs] 1 where the chosen side is longer, 0 where it is shorter, 1/2 where both are equally long.
        right: [pairs] 1 where the classifier of words is right, NaN where there is none.
        groups: [pairs] the number of each prompt.
    """
    columns: dict[str, Sequence[Any]] = {}
    if any(row.pair.tag for row in data.rows):
        columns["tag"] = [row.pair.tag or None for row in data.rows]
    columns["turns of the user"] = _turns(data)
    for name, others in _others(data).items():
        columns[f"{name}_source" if name in columns else name] = others
    found = []
    for name, values in columns.items():
        numbers, kinds = _numbered(values)
        counts = np.bincount(numbers)
        if not 2 <= len(kinds) <= MOST_VALUES:
            continue
        rows = []
        for kind in np.argsort(-counts, kind="stable").tolist():
            of_kind = numbers == kind
            median = np.median(lengths[of_kind], axis=0)
            shown = [cell(share_over_groups(hits[of_kind], groups[of_kind])) for hits in (longer, right)]
            rows.append([kinds[kind] or "(none)", int(counts[kind]), *map(float, median), *shown])
        names = (name, "pairs", "prompt (words)", "chosen (words)", "rejected (words)", "longer side", "words")
        note = f"Lengths are medians. The last columns are accuracies. {NOTHING}"
        found.append(Table(f"Pairs by {name}", names, rows, note))
    return found


def _numbered(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """[pairs] the number of each value, and the values as texts, sorted. None is ""."""
    texts = {value: "" if value is None else str(value) for value in dict.fromkeys(values)}
    kinds = sorted(set(texts.values()))
    places = {text: place for place, text in enumerate(kinds)}
    return np.array([places[texts[value]] for value in values], np.int64), kinds


def _others(data: AuditData) -> Mapping[str, list[Any]]:
    """The source's columns with few values, in the order of the pairs."""
    by_row = data.columns
    found: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for row in by_row.values() for name in row):
        if name == data.tag_column:
            continue
        values = [by_row.get(row.index, {}).get(name) for row in data.rows]
        simple = all(isinstance(value, str | int | bool | None) for value in values)
        if simple and 2 <= len(set(values)) <= MOST_VALUES:
            found[name] = values
    return found


def _turns(data: AuditData) -> list[str]:
    counts = []
    for row in data.rows:
        prompt = row.pair.prompt
        if isinstance(prompt, str):
            count = max(1, prompt.count("\n\nHuman:") + (prompt.startswith("Human:"))) if "Human:" in prompt else 1
        else:
            count = sum(message["role"] == "user" for message in prompt)
        counts.append(str(count) if count < 10 else "10 or more")
    return counts
