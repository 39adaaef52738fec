"""The table of an audit's pairs: every row of the source with what each part found about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_did.audit.report import Finding, Part
from lit_did.audit.source import AuditData
from lit_did.scoring.table import source_columns

_FIRST, _LAST = ("index", "where", "tag"), ("flags", "refused")


def pairs_table(data: AuditData, parts: Mapping[str, Part], raised: Sequence[Finding]) -> dict[str, list]:
    """The columns of the table, in the order of the source.

    Args:
        data: The pairs. Rows that were refused are in the table too, with the reason in `refused`.
        parts: What was found. A value that is NaN is None in the table.
        raised: The findings that `flags` names.
    """
    numbers = [*data.row_numbers.tolist(), *(row.index for row in data.skipped)]
    order = np.argsort(numbers, kind="stable").tolist() if data.skipped else range(len(numbers))

    def column(values: Any, of_refused: Sequence[Any] | None = None) -> list:
        known = _without_nan(values)
        if len(known) != len(data):
            raise ValueError(f"Expected a column with {len(data)} values, one a pair, but got {len(known)}.")
        if not data.skipped:
            return known
        known += [None] * len(data.skipped) if of_refused is None else of_refused
        return [known[place] for place in order]

    found: dict[str, Any] = {}
    for part in parts.values():
        if taken := found.keys() & part.columns.keys():
            raise ValueError(f"Expected parts with columns of their own, but {part.name} has {sorted(taken)} too.")
        found |= part.columns
    flags: dict[int, list[str]] = {}
    for finding in raised:
        for row in finding.rows:
            flags.setdefault(int(row), []).append(finding.name)
    index = [numbers[place] for place in order]
    others = source_columns((*_FIRST, *found, *_LAST), index, data.columns, left_out=data.tag_column)
    return {
        "index": index,
        "where": column([row.where for row in data.rows], [row.where for row in data.skipped]),
        "tag": column([row.pair.tag for row in data.rows]),
        **others,
        **{name: column(values) for name, values in found.items()},
        "flags": [";".join(flags.get(number, ())) for number in index],
        "refused": column([None] * len(data), [row.reason for row in data.skipped]),
    }


def _without_nan(values: Any) -> list:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return [None if isinstance(value, float) and value != value else value for value in values]
