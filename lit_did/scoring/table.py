"""The table of scored pairs: its rows, the source's columns beside them, and writing it as CSV or Parquet."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lit_did.data.dataset import Example
from lit_did.ops import SequenceStatistics
from lit_did.writing import whole_file

SUFFIXES = (".csv", ".parquet")
Row = dict[str, Any]


def rows_of(
    examples: Sequence[Example],
    chosen: SequenceStatistics,
    rejected: SequenceStatistics,
    *,
    truncated: Collection[int],
    reward_margin: Tensor | None = None,
) -> list[Row]:
    """The rows of scored pairs, as Python numbers.

    Args:
        examples: The pairs.
        chosen: The statistics [pairs] of their chosen completions.
        rejected: The statistics [pairs] of their rejected completions.
        truncated: The row numbers of pairs that lost tokens to `max_length`.
        reward_margin: [pairs].
    """
    columns: dict[str, list] = {
        "index": [example.index for example in examples],
        "margin": margin(chosen, rejected).tolist(),
        **({} if reward_margin is None else {"reward_margin": reward_margin.tolist()}),
        **{f"chosen_{name}": values.tolist() for name, values in chosen._asdict().items()},
        **{f"rejected_{name}": values.tolist() for name, values in rejected._asdict().items()},
        "prompt_num_tokens": [len(example.prompt_ids) for example in examples],
        "truncated": [example.index in truncated for example in examples],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def margin(chosen: SequenceStatistics, rejected: SequenceStatistics) -> Tensor:
    """[pairs] float64: the log-ratio of the chosen completion less that of the rejected one."""
    return chosen.log_ratio.double() - rejected.log_ratio.double()


def with_columns(rows: Sequence[Row], columns: Mapping[int, Mapping[str, Any]]) -> dict[str, list]:
    """The columns of a table: those of `rows`, and then the source's.

    A column of the source whose name is taken gets the suffix `_source`, and one warning says so.

    Args:
        rows: From `rows_of`.
        columns: The source's columns by row number, from `read_columns`. A row without a column has None.
    """
    own = list(rows[0])
    others = source_columns(own, [row["index"] for row in rows], columns)
    return {**{name: [row[name] for row in rows] for name in own}, **others}


def source_columns(
    own: Iterable[str], index: Sequence[int], columns: Mapping[int, Mapping[str, Any]], left_out: str | None = None
) -> dict[str, list]:
    """The source's columns for a table. One warning names those that get the suffix `_source`.

    Args:
        own: The names of the table's own columns.
        index: The row numbers of the table's rows in the source.
        columns: As for `with_columns`.
        left_out: A column that the table lacks.
    """
    own, names = set(own), dict[str, str]()
    for number in index:
        for name in columns.get(number, ()):
            if name not in names and name != left_out:
                names[name] = _free(name, {*own, *names.values()})
    if renamed := [f"`{name}` is `{new}`" for name, new in names.items() if new != name]:
        warnings.warn(
            f"Columns of the source have names of the table's own columns. In the table {', '.join(renamed)}.",
            stacklevel=3,
        )
    return {new: [columns.get(number, {}).get(name) for number in index] for name, new in names.items()}


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_source"
    return name


def check_table_path(path: Path) -> None:
    """Raises ValueError for a suffix that is not in `SUFFIXES`, and ModuleNotFoundError without a needed pyarrow."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"Expected `output` to end in {' or '.join(SUFFIXES)}, but got {path.name!r}.")
    if path.suffix == ".parquet":
        with _needs("pyarrow", f"Writing {path}"):
            import pyarrow.parquet  # noqa: F401


def write_table(table: Mapping[str, list], path: Path) -> None:
    """Writes columns as CSV or Parquet; the suffix says which. The file appears whole or not at all.

    Nested values are JSON in both. None is an empty cell in CSV. In Parquet, a column whose values have no common type
    is text.
    """
    check_table_path(path)
    with whole_file(path) as beside:
        (_write_csv if path.suffix == ".csv" else _write_parquet)(table, beside)


def _write_csv(table: Mapping[str, list], path: Path) -> None:
    # Text of the source may hold halves of surrogate pairs, which UTF-8 cannot.
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        # The writer quotes a lone "\r" only if its own lines end with one.
        lines = SimpleNamespace(write=lambda row: file.write(row.removesuffix("\r\n") + "\n"))
        writer = csv.writer(lines, lineterminator="\r\n")
        writer.writerow(table)
        writer.writerows(map(_cell, values) for values in zip(*table.values(), strict=True))


def _write_parquet(table: Mapping[str, list], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({name: _array(values) for name, values in table.items()}), path)


def import_pandas() -> Any:
    """The package pandas. Raises ModuleNotFoundError, which names the extra, if it is not installed."""
    with _needs("pandas", "A table in memory"):
        import pandas
    return pandas


def _cell(value: Any) -> Any:
    nested = isinstance(value, Mapping | list | tuple)
    return json.dumps(value, ensure_ascii=False, default=str) if nested else value


def _array(values: list) -> Any:
    import pyarrow

    values = list(map(_cell, values))
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
        texts = [None if value is None else str(value).encode(errors="backslashreplace").decode() for value in values]
        return pyarrow.array(texts)


@contextmanager
def _needs(package: str, what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {package}. Run pip install 'lit-did[tables]'.") from error
