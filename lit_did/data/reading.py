"""Reads preference pairs from JSON Lines, Parquet, a datasets.Dataset or a list, each with its place for errors."""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair

_FIELDS = ("prompt", "chosen", "rejected", "tag")
_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")


class SourceRow(NamedTuple):
    """A pair, its row number in the source (from 0; blank lines not counted), and what errors call it."""

    index: int
    where: str
    pair: PreferencePair


class SkippedRow(NamedTuple):
    """A row that was left out: its row number in the source, what errors call it, and the reason in a sentence."""

    index: int
    where: str
    reason: str


def read_pairs(
    source: Any, name: str = "source", *, columns: Mapping[str, str | None] | None = None, on_bad_rows: str = "skip"
) -> list[SourceRow]:
    """Reads and checks all pairs of a source. One warning names the rows that were skipped.

    Args, Returns, Raises: as `read_rows`, whose rows these are.
    """
    rows, skipped = read_rows(source, name, columns=columns, on_bad_rows=on_bad_rows)
    if skipped:
        warnings.warn(describe_skipped(name, skipped, len(rows) + len(skipped)), stacklevel=2)
    return rows


def read_rows(
    source: Any, name: str = "source", *, columns: Mapping[str, str | None] | None = None, on_bad_rows: str = "skip"
) -> tuple[list[SourceRow], list[SkippedRow]]:
    """Reads and checks all pairs of a source, and says which rows it skipped.

    Args:
        source: the path of a .jsonl, .jsonl.gz, .json or .json.gz file (UTF-8, one object a line, blank lines
            skipped) or of a .parquet file; a `datasets.Dataset`; or a list of dicts. Formats of a row: `parse_pair`.
        name: what errors call a source that is not a file.
        columns: for each of our names the source's: {"prompt": "question"}. None as a name leaves the column out.
        on_bad_rows: what to do with rows that are whole but cannot be trained on (`UnusableRowError`): "skip" them, or
            "raise". Malformed rows always raise.

    Returns:
        The rows in the order of the source, and those that were skipped.

    Raises:
        FileNotFoundError: if the file is not there.
        TypeError: if `source` is none of the above.
        ValueError: for malformed content, naming file and line (from 1), or source and row (from 0), and the reason.
        ImportError: for a .parquet file, if pyarrow is not installed.
    """
    check_on_bad_rows(on_bad_rows)
    check_columns(columns)
    if isinstance(source, (str, Path)):
        name = str(source)
        rows = _read_file(Path(source))
    elif isinstance(source, (list, tuple)):
        rows = ((f"{name}, row {number}", row) for number, row in enumerate(source))
    elif isinstance(getattr(source, "column_names", None), list):  # a datasets.Dataset, told without importing it
        rows = _read_dataset(source, name)
    else:
        splits = isinstance(source, dict) and hasattr(source, "column_names")  # a datasets.DatasetDict
        hint = f" of the splits {sorted(source)}; choose one" if splits else ""
        raise TypeError(
            f"Expected `{name}` to be a path, a list of dicts or a datasets.Dataset, "
            f"but got {type(source).__name__}{hint}."
        )
    pairs: list[SourceRow] = []
    skipped: list[SkippedRow] = []
    for index, (where, row) in enumerate(rows):
        try:
            pairs.append(SourceRow(index, where, parse_pair(row, where)))
        except UnusableRowError as error:
            if on_bad_rows == "raise":
                raise
            skipped.append(SkippedRow(index, where, str(error).removeprefix(f"{where}: ")))
    if not pairs:
        if skipped:
            raise ValueError(
                f"{name}: Expected preference pairs, but got none to train on. {describe_skipped(name, skipped)}"
            )
        raise ValueError(f"{name}: contains no preference pairs.")
    return pairs, skipped


def describe_skipped(name: str, skipped: Sequence[SkippedRow], num_rows: int | None = None) -> str:
    """One text on the rows of a source that were skipped: how many, why and where."""
    reasons = Counter(row.reason for row in skipped).most_common(3)
    lines = []
    for reason, count in reasons:
        places = [row.where for row in skipped if row.reason == reason]
        more = ", ..." if count > 3 else ""
        lines.append(f"{count} with the reason: {reason} ({'; '.join(places[:3])}{more})")
    others = len(skipped) - sum(count for _, count in reasons)
    if others:
        lines.append(f"{others} for other reasons")
    of = f" of {num_rows}" if num_rows is not None else ""
    return (
        f"{name}: {len(skipped)}{of} rows cannot be trained on and are skipped. {' '.join(lines)} "
        'Mend the rows, or pass `on_bad_rows="raise"` to stop at the first.'
    )


def check_on_bad_rows(on_bad_rows: Any) -> None:
    """Raises ValueError unless `on_bad_rows` is "skip" or "raise"."""
    if on_bad_rows not in ("skip", "raise"):
        raise ValueError(f'Expected `on_bad_rows` to be "skip" or "raise", but got {on_bad_rows!r}.')


def check_columns(columns: Any) -> None:
    """Raises unless `columns` maps our names to the source's."""
    if columns is not None and not isinstance(columns, Mapping):
        raise TypeError(f'Expected `columns` to be a dict such as {{"prompt": "question"}}, but got {columns!r}.')


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"Expected a file of preference pairs, but {path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{path}: Expected a file of preference pairs, but got a directory.")
    if path.name.endswith(_JSON_SUFFIXES):
        return _read_json_lines(path)
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    raise ValueError(f"{path}: Expected a file name ending in one of {', '.join(_SUFFIXES)}, but got {path.name!r}.")


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    open_file = gzip.open if path.name.endswith(".gz") else open
    number = 0
    # Bytes, not text: lines end at "\n" only (strings may hold other separators), and bad UTF-8 has a line number.
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                if line.strip():
                    yield f"{path}, line {number}", _parse_line(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, line {number + 1}: Expected gzip data, but got: {error}.") from error


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: Expected UTF-8, but got byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: Expected one JSON object a line, but got invalid JSON: {error.msg} (column {error.colno})."
        ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow. Install it with: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: Expected Parquet data, but got: {error}") from error
    with file:
        columns = _choose_columns(file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1


def _read_dataset(dataset: Any, name: str) -> Iterator[tuple[str, Any]]:
    # Other columns (images, say) may be slow to decode, so they are left out before iterating.
    columns = _choose_columns(dataset.column_names, name)
    for number, row in enumerate(dataset.select_columns(columns)):
        yield f"{name}, row {number}", row


def _choose_columns(names: list[str], where: str) -> list[str]:
    if not {"chosen", "rejected"} <= set(names):
        raise ValueError(f"{where}: Expected the columns `chosen` and `rejected`, but got {names}.")
    return [name for name in _FIELDS if name in names]
