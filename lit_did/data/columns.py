"""The columns of preference pairs that are no part of the pair, such as scores, models and ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_did.data.formats import find_columns
from lit_did.data.reading import Columns, read_raw


def read_columns(
    source: Any, name: str = "source", *, columns: Columns | None = None, texts: bool = False
) -> dict[int, dict[str, Any]]:
    """Reads the columns of every row that are no part of its pair. The column of `tag` is among them.

    Args:
        source: As for `read_rows`, which has read it before.
        name: What errors call a source that is not a file.
        columns: Names of the source's columns by field, such as {"prompt": "question"}.
        texts: Whether to read the columns with the pair's texts too.

    Returns:
        {number of a row in the source: {column: value}}. As in the source, rows may have different columns.

    Example:
        >>> read_columns([{"prompt": "2+2?", "chosen": "4", "rejected": "5", "score": 0.9}])
        {0: {'score': 0.9}}
    """
    found: dict[int, dict[str, Any]] = {}
    for index, (where, row) in enumerate(read_raw(source, name, lambda names, _: names)):
        if isinstance(row, Mapping):
            left_out = set() if texts else _of_pair(row, where, columns)
            found[index] = {str(column): value for column, value in row.items() if column not in left_out}
    return found


def _of_pair(row: Mapping[str, Any], where: str, columns: Columns | None) -> set[str]:
    pair = find_columns(row, columns, where)
    return {column for field, column in pair.named.items() if field != "tag"} | set(pair.prompts)
