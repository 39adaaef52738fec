"""Reads the rows of a data module's splits, with the warnings about them; holds out rows for validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lit_did.data.reading import Columns, OnBadRows, SkippedRow, SourceRow, read_rows
from lit_did.data.templates import describe_unread


class Rows(NamedTuple):
    """The rows of a split."""

    rows: list[SourceRow]
    skipped: list[SkippedRow]
    notes: list[str]
    """the warnings of the source"""
    starts: list[int]
    """the number of the first row of each source; a mixture has several"""


def read_split(
    sources: Sequence[Any],
    name: str,
    *,
    columns: Columns | None,
    on_bad_rows: OnBadRows,
    template: tuple[Any, ...],
    warn: Callable[[str], None],
) -> Rows:
    """Reads the rows of sources, one after the other. Their rows are counted through.

    Args:
        sources: What `read_rows` takes; several for a mixture.
        name, columns, on_bad_rows: As for `read_rows`.
        template: The tokenizer, the chat template and its variables, as `describe_unread` takes them.
        warn: Called with each warning.
    """
    split = Rows([], [], [], [])

    def note(text: str) -> None:
        split.notes.append(text)
        warn(text)

    for source in sources:
        rows, skipped = read_rows(source, name, columns=columns, on_bad_rows=on_bad_rows, warn=note)
        if unread := describe_unread(name, (row.pair for row in rows), *template):
            note(unread)
        start = len(split.rows) + len(split.skipped)
        split.rows.extend(row._replace(index=row.index + start) for row in rows)
        split.skipped.extend(row._replace(index=row.index + start) for row in skipped)
        split.starts.append(start)
    return split


def hold_out(split: Rows, fraction: float) -> tuple[Rows, Rows]:
    """The rows to train on and the last ones, each with the skipped rows among them.

    Raises:
        ValueError: If no row is left to train on.
    """
    rows, skipped = split.rows, split.skipped
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise ValueError(
            f"Expected `train` to have rows left after holding out val_fraction={fraction}, but got {len(rows)} in all."
        )
    cut = len(rows) - count
    first = rows[cut].index
    return (
        split._replace(rows=rows[:cut], skipped=[row for row in skipped if row.index < first]),
        split._replace(rows=rows[cut:], skipped=[row for row in skipped if row.index >= first]),
    )
