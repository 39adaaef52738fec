"""Reads the rows of files, each with its place for errors: JSON Lines, JSON, CSV and Parquet.

Only regular files are opened, because others could block or never end. A line has at most 64 MiB.
"""

from __future__ import annotations

import csv
import errno
import glob
import gzip
import json
import os
import re
import stat
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from lit_did.data.errors import in_words

Row = tuple[str, Any]
"""what errors call a row, and what it holds"""
Choose = Callable[[list[str], str], list[str]]
"""from the columns of a table and its name to the columns to read"""

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_JSON = (".json", ".json.gz")
_CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
SUFFIXES = (*_JSON_LINES, *_JSON, *_CSV, ".parquet")
MAX_LINE = 64 * 2**20  # bytes of a line, and of a CSV cell, which may span lines
MAX_JSON = 2**30  # bytes of a .json file that holds one list or one object, which is in memory as a whole
_ROWS = 1024  # rows of Parquet decoded at once; an error inside a page names all of them
_SPACE = re.compile(r"[ \t\n\r]*")
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval)(?![a-z])")
_KINDS = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def _is_glob(path: str) -> bool:
    """Whether a path is a pattern. A path that exists is not."""
    return glob.has_magic(path) and not os.path.lexists(path)


def find_files(path: str) -> list[Path]:
    """The files of a path: a file, the matches of a pattern such as "data/*.jsonl", or all in a folder and below it.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a folder holds the files of several splits.
    """
    if _is_glob(path):
        paths = [Path(found) for found in sorted(glob.glob(path, recursive=True))]
        if not paths:
            raise FileNotFoundError(f"Expected data files, but no path matches {path}.")
        return [file for found in paths for file in (_find_in_folder(found) if found.is_dir() else [found])]
    if stat.S_ISDIR(_stat(Path(path)).st_mode):
        return _find_in_folder(Path(path))
    return [Path(path)]


def read_file(path: Path, choose: Choose) -> Iterator[Row]:
    """Reads the rows of a file. The suffix says the format.

    Args:
        path: The file.
        choose: Chooses the columns to read from a Parquet file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: For a path that is not a regular file or has an unknown suffix, and for malformed content. The
            message names the line (from 1) or the row (from 0).
        ImportError: For a .parquet file, if pyarrow is not installed.
    """
    _check_is_regular(path)
    name = path.name.lower()
    if name.endswith(_JSON_LINES):
        return _read_json_lines(path)
    if name.endswith(_JSON):
        return _read_json(path)
    if name.endswith(_CSV):
        return _read_csv(path)
    if name.endswith(".parquet"):
        return _read_parquet(path, choose)
    raise ValueError(f"{path}: Expected a file name ending in one of {', '.join(SUFFIXES)}, but got {path.name!r}.")


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    """Reads the lines of a text file, each with its place and without the line end. Blank lines are skipped."""
    _check_is_regular(path)
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, _decode(line, where).rstrip("\r\n")


def read_table(table: Any, name: str, choose: Choose) -> Iterator[Row]:
    """Reads the rows of a pyarrow.Table or RecordBatch; see `read_file`."""
    table = table.select(choose(table.schema.names, name))
    return _read_batches(table.to_batches(max_chunksize=_ROWS) if hasattr(table, "to_batches") else [table], name)


def _check_is_regular(path: Path) -> None:
    mode = _stat(path).st_mode
    if not stat.S_ISREG(mode):
        is_a = next((name for check, name in _KINDS if check(mode)), "something else")
        link = f" (through the link to {os.readlink(path)})" if path.is_symlink() else ""
        raise ValueError(f"{path}: Expected a data file, but got {is_a}{link}.")


def _stat(path: Path) -> os.stat_result:
    """The kind of a path, without opening it, because opening a FIFO blocks."""
    try:
        return path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise FileNotFoundError(
                f"Expected a data file, but {path} links to {os.readlink(path)}, which does not exist."
            ) from None
        raise FileNotFoundError(f"Expected a data file, but {path} does not exist.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        loops = isinstance(error, OSError) and error.errno == errno.ELOOP
        got = "a loop of links" if loops else getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{str(path)!r}: Expected a data file, but got: {got}.") from None


def _find_in_folder(folder: Path) -> list[Path]:
    if any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        raise ValueError(
            f"{folder}: Expected a folder of data files, but got one that `datasets` wrote. "
            "Pass `datasets.load_from_disk(folder)` instead, with its split if it has several."
        )
    walk = os.walk(folder, onerror=_raise)  # does not follow links to folders, which may be loops
    files = [
        Path(parent, name)
        for parent, _, names in walk
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".") and "/." not in parent[len(str(folder)) :]
    ]
    if not files:
        raise FileNotFoundError(
            f"Expected data files in {folder}, but it has none ending in one of {', '.join(SUFFIXES)}."
        )
    splits = {match[1]: file.parent / match[1] for file in files if (match := _SPLIT.match(file.name.lower()))}
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: Expected the files of one split, but got those of {', '.join(sorted(splits))}. "
            f'Pass a pattern instead, such as "{splits[max(splits)]}*".'
        )
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error  # a folder that cannot be read would look empty


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, gzipped or not, with their numbers from 1. Each has at most MAX_LINE bytes."""
    # Bytes, not text: lines end at "\n" only, because strings may hold other separators, and an error in the encoding
    # then has a line number.
    number = 1
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}, line {number}: Expected at most {MAX_LINE} bytes a line, but got more.")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                yield number, line
                number += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, line {number}: Expected gzip data, but got: {error}.") from error
    except OSError as error:
        raise type(error)(error.errno, f"{path}, line {number}: {error.strerror or error}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: Expected UTF-8, but got byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line. "
            "Convert the file, for example from Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE"
        ) from error


def _read_json_lines(path: Path, expected: str = "one JSON object a line") -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if line.strip():
            text = _decode(line, where).strip()
            yield where, _parse(partial(_JSON_DECODER.decode, text), expected, _always(where))


def _always(where: str) -> Callable[[int], str]:
    return lambda place: where


def _read_json(path: Path) -> Iterator[Row]:
    """The items of one list, one object a line, or one object over several lines."""
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    number, first = next(lines, (1, b""))
    if not first.lstrip().startswith(b"["):
        row = None if _is_json(first) else _one_object(path)
        expected = "one list of JSON objects, or one object a line"
        yield from [(f"{path}, line {number}", row)] if row is not None else _read_json_lines(path, expected)
        return
    size = 0
    texts: list[str] = []
    numbers: list[int] = []
    for at, line in chain([(number, first)], lines):
        size += len(line)
        if size > MAX_JSON:
            raise ValueError(
                f"{path}: Expected a list of at most {MAX_JSON} bytes, but got more. Write JSON Lines instead."
            )
        texts.append(_decode(line, f"{path}, line {at}"))
        numbers.append(at)
    ends = list(accumulate(map(len, texts)))
    last = len(ends) - 1
    yield from _items("".join(texts), lambda place: f"{path}, line {numbers[min(bisect_right(ends, place), last)]}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _one_object(path: Path) -> Any:
    """The object of a file that holds one over several lines; None for anything else."""
    size, lines = 0, []
    for _, line in _lines(path):
        size += len(line)
        if size > MAX_JSON:
            return None
        lines.append(line)
    try:
        return _JSON_DECODER.decode(b"".join(lines).decode())
    except (ValueError, RecursionError):
        return None


def _items(text: str, where: Callable[[int], str]) -> Iterator[Row]:
    """The items of a list, each with the line on which it begins."""
    place = _skip(text, text.index("[") + 1)
    closed = text[place : place + 1] == "]"
    while not closed:
        row, end = _parse(partial(_JSON_DECODER.raw_decode, text, place), "a list of JSON objects", where, place)
        yield where(place), row
        place = _skip(text, end)
        mark = text[place : place + 1]
        closed = mark == "]"
        if not closed and mark != ",":
            got = f"invalid JSON: {mark!r} after an item" if mark else "the end of the file within the list"
            raise ValueError(f"{where(place)}: Expected a list of JSON objects, but got {got}.")
        place = _skip(text, place + 1) if not closed else place
    if _skip(text, place + 1) < len(text):
        raise ValueError(f"{where(place)}: Expected one list of JSON objects, but got more text after it.")


def _skip(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    assert space is not None  # it matches the empty string
    return space.end()


def _parse(decode: Callable[[], Any], expected: str, where: Callable[[int], str], start: int = 0) -> Any:
    """Calls `decode` and turns what it raises into an error of one line that begins with its place."""
    try:
        return decode()
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where(error.pos)}: Expected {expected}, but got invalid JSON: {error.msg} (column {error.colno})."
        ) from error
    except RecursionError:
        raise ValueError(f"{where(start)}: Expected {expected}, but got values that are nested too deeply.") from None
    except _RepeatedKey as error:
        raise ValueError(
            f"{where(start)}: Expected every key once, but got {in_words([error])} more than once."
        ) from None
    except ValueError:  # Python reads no integer of more digits than sys.get_int_max_str_digits()
        most = sys.get_int_max_str_digits()
        raise ValueError(f"{where(start)}: Expected numbers of at most {most} digits, but got a longer one.") from None


class _RepeatedKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for number, key in enumerate(keys) if key in keys[:number]))
    return row


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_csv(path: Path) -> Iterator[Row]:
    """The rows below the header. Every cell is a string."""
    header: list[str] | None = None
    texts = (_decode(line, f"{path}, line {number}") for number, line in _lines(path))
    above = []  # the header's line, and blank ones before it
    for text in texts:
        above.append(text)
        if text.strip():
            break
    cells = csv.reader(chain(above, texts), delimiter=_delimiter(path, "".join(above)), strict=True)
    while True:
        where = f"{path}, line {cells.line_num + 1}"  # the row's first line; it may span several
        try:
            with _field_limit():
                values = next(cells, None)
        except csv.Error as error:
            raise ValueError(f"{where}: Expected CSV, but got: {error}.") from error
        if values is None:
            return
        if not values:
            continue  # a blank line
        if header is None:
            header = values
            if len(set(header)) < len(header):
                raise ValueError(f"{where}: Expected every column once, but got the header {in_words(header)}.")
        elif len(values) != len(header):
            raise ValueError(f"{where}: Expected {len(header)} cells as in the header, but got {len(values)}.")
        else:
            yield where, dict(zip(header, values, strict=True))


def _delimiter(path: Path, header: str) -> str:
    """What separates cells: a tab in .tsv; in .csv a comma, or a semicolon or a tab if the header has no comma."""
    if path.name.lower().endswith((".tsv", ".tsv.gz")):
        return "\t"
    return next((mark for mark in (",", ";", "\t") if mark in header), ",")


@contextmanager
def _field_limit() -> Iterator[None]:
    """Sets the bound of a cell for a while. The csv module keeps one for the whole process."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, choose: Choose) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow. Install it with: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: Expected Parquet data, but got: {_one_line(error)}.") from error
    with file:
        names = choose(file.schema_arrow.names, str(path))
        yield from _read_batches(file.iter_batches(batch_size=_ROWS, columns=names), str(path))


def _read_batches(batches: Iterable[Any], name: str) -> Iterator[Row]:
    import pyarrow

    number = 0
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{name}, row {number} or one of the next {_ROWS - 1}: Expected Parquet data, but got: "
                f"{_one_line(error)}."
            ) from error
        if batch is None:
            return
        for row in _read_batch(batch, name, number):
            yield f"{name}, row {number}", row
            number += 1


def _read_batch(batch: Any, name: str, number: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # bytes that are not UTF-8, or times out of Python's range
        for place in range(batch.num_rows):
            try:
                batch.slice(place, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                raise ValueError(
                    f"{name}, row {number + place}: Expected values that Python can hold, but got: {_one_line(error)}."
                ) from error
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
