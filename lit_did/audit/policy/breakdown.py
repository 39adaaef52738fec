"""Every figure of a policy over all pairs, by tag and by other columns of the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lit_did.audit.blocks import Block, Picture, Table
from lit_did.audit.page import pictures
from lit_did.audit.policy import calibration, displacement, information, length, margins
from lit_did.audit.policy.scored import Scored
from lit_did.audit.report import Estimate
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS
from lit_did.audit.wording import NOTHING, cell

Topic = tuple[Mapping[str, str], Callable[[Scored], dict[str, Estimate]]]
TOPICS: dict[str, Topic] = {
    "Margin and accuracy": (margins.LABELS, margins.margin_figures),
    "Length": (length.LABELS, length.length_figures),
    "Displacement": (displacement.LABELS, displacement.displacement_figures),
    "Calibration": (calibration.LABELS, calibration.calibration_figures),
    "Information": (information.LABELS, information.information_figures),
}
MOST_VALUES = 30


def figures_of(scored: Scored) -> dict[str, Estimate]:
    """Every figure by name. With fewer than 20 prompts, all are NaN: there is too little data."""
    if scored.num_prompts < MIN_PROMPTS:
        nothing = Estimate(float("nan"), count=scored.num_prompts)
        return {name: nothing for labels, _ in TOPICS.values() for name in labels}
    return {name: value for _, figures in TOPICS.values() for name, value in figures(scored).items()}


def column_values(data: AuditData, rows: Sequence[int], by: Sequence[str]) -> dict[str, list[str]]:
    """By "tag" and the columns `by`, the value of every pair as text. A tag that no pair has is left out.

    Args:
        data: The pairs.
        rows: Row numbers in the source, in the order of the values.
        by: Names of columns of the source.
    """
    tags = {row.index: row.pair.tag for row in data.rows}
    found = {"tag": [tags[row] for row in rows]}
    if not any(found["tag"]):
        del found["tag"]
    for name in by:
        values = [data.columns.get(row, {}).get(name) for row in rows]
        found[name] = ["" if value is None else str(value) for value in values]
    return found


def by_value(scored: Scored, values: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """By value, the most frequent ones first, every figure of its pairs; of at most 30 values.

    Args:
        scored: The pairs.
        values: [pairs].
    """
    array = np.array(values, dtype=object)
    frequent = [value for value, _ in Counter(values).most_common(MOST_VALUES)]
    return {value: figures_of(scored.select(array == value)) for value in frequent}


def breakdown_blocks(column: str, found: Mapping[str, Mapping[str, Estimate]], num_values: int) -> list[Block]:
    """A picture of the accuracies, and a table a topic, with a row a value.

    Args:
        column: The column's name.
        found: From `by_value`.
        num_values: How many values the column has.
    """
    note = "Intervals are over prompts."
    if num_values > len(found):
        note += f" The {num_values - len(found)} rarest of {num_values} values are not shown."
    known = {value or "(none)": figures for value, figures in found.items() if figures["accuracy"].count >= MIN_PROMPTS}
    blocks: list[Block] = []
    if len(known) > 1:
        series = {
            "accuracy": [figures["accuracy"] for figures in known.values()],
            "at equal length": [figures["accuracy_at_equal_length"] for figures in known.values()],
        }
        picture = pictures.forest(list(known), series, "accuracy", line=0.5)
        blocks.append(
            Picture(f"Accuracy, by {column}", picture, f"Accuracy, and accuracy at equal length, by {column}.", note)
        )
    for topic, (labels, _) in TOPICS.items():
        rows = [
            [value or "(none)", figures["accuracy"].count, *(cell(figures[name]) for name in labels)]
            for value, figures in found.items()
        ]
        blocks.append(Table(f"{topic}, by {column}", [column, "prompts", *labels.values()], rows, f"{note} {NOTHING}"))
    return blocks


def figures_table(figures: Mapping[str, Any]) -> Table:
    """Every figure over all pairs."""
    rows = [[label, cell(figures[name])] for labels, _ in TOPICS.values() for name, label in labels.items()]
    return Table("All pairs", ["", "value"], rows, note=f"95% intervals over prompts. {NOTHING}")
