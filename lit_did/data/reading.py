"""Reads preference pairs from JSON Lines, Parquet, a datasets.Dataset or a list, each with its place for errors."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_did.data.pairs import PreferencePair, parse_pair

_FIELDS = ("prompt", "chosen", "rejected", "tag")
_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")


class SourceRow(NamedTuple):
    """A pair, its row number in the source (from 0; blank lines not counted), and what errors call it."""

    index: int
    where: str
    pair: PreferencePair


def read_pairs(source: Any, name: str = "source") -> list[SourceRow]:
    """Reads and checks all pairs of a source.

    Args:
        source: the path of a .jsonl, .jsonl.gz, .json or .json.gz file (UTF-8, one object a line, blank lines
            skipped) or of a .parquet file; a `datasets.Dataset`; or a list of dicts. Formats of a row: `parse_pair`.
        name: what errors call a source that is not a file.

    Returns:
        The rows in the order of the source.

    Raises:
        FileNotFoundError: if the file is not there.
        TypeError: if `source` is none of the above.
        ValueError: for malformed content, naming file and line (from 1), or source and row (from 0), and the reason.
        ImportError: for a .parquet file, if pyarrow is not installed.
    """
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
    pairs = [SourceRow(index, where, parse_pair(row, where)) for index, (where, row) in enumerate(rows)]
    if not pairs:
        raise ValueError(f"{name}: contains no preference pairs.")
    return pairs


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
