"""Reads preference pairs from files, tables, data sets of the hub or lists, each with its place for errors.

`lit-did docs data` lists the sources, the formats of rows and the names of columns.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

from lit_did.arguments import check_choice
from lit_did.data import hub
from lit_did.data.errors import in_words, one_line, unusable
from lit_did.data.files import Choose, find_files, read_file, read_table
from lit_did.data.formats import check_columns, columns_to_read, describe_columns
from lit_did.data.messages import KNOWN_ROLES
from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_row, strip_repeated
from lit_did.data.prompts import are_repeated, num_repeats

Columns = Mapping[str, str | None]
OnBadRows = Literal["skip", "raise"]
Warn = Callable[[str], None]


class SourceRow(NamedTuple):
    """A pair and its place."""

    index: int  # type: ignore[assignment]  # a field may hide the method of tuples
    """row number in the source, from 0; blank lines are not counted"""
    where: str
    """what errors call the row"""
    pair: PreferencePair


class SkippedRow(NamedTuple):
    """A row that was left out."""

    index: int  # type: ignore[assignment]
    """row number in the source, as in `SourceRow`"""
    where: str
    """what errors call the row"""
    reason: str
    """why it was left out, in a sentence"""


def read_pairs(
    source: Any, name: str = "source", *, columns: Columns | None = None, on_bad_rows: OnBadRows = "skip"
) -> list[SourceRow]:
    """Reads and checks all pairs of a source. One warning names the rows that were skipped.

    Args:
        source: A path, a folder, a pattern such as "data/*.jsonl", a list of these, a name of the Hugging Face hub such
            as "org/name:train", a table or a list of dicts; see `lit-did docs data`.
        name: What errors call a source that is not a file.
        columns: Names of the source's columns by field, such as {"prompt": "question"}. None leaves a field out;
            {"prompt": None} says that the prompt is in both completions.
        on_bad_rows: What to do with rows that are well-formed but cannot be trained on: "skip" them, or "raise".

    Returns:
        The rows in the order of the source, without those that were skipped.

    Raises:
        FileNotFoundError: If there is no such file, nor a data set of the hub.
        ConnectionError: If `source` is not a local file and the hub cannot be reached.
        TypeError: If `source` or an argument has an unknown type.
        ValueError: For malformed content, and for a source without pairs. The message begins with file and line (from
            1), or source and row (from 0).
        ImportError: For a .parquet file, if pyarrow is not installed.
    """
    rows, skipped = read_rows(source, name, columns=columns, on_bad_rows=on_bad_rows)
    if skipped:
        name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else name
        warnings.warn(describe_skipped(name, skipped, len(rows) + len(skipped)), stacklevel=2)
    return rows


def read_rows(
    source: Any,
    name: str = "source",
    *,
    columns: Columns | None = None,
    on_bad_rows: OnBadRows = "skip",
    warn: Warn = warnings.warn,
) -> tuple[list[SourceRow], list[SkippedRow]]:
    """Reads and checks all pairs of a source, and returns the rows that it skipped beside the others.

    Args:
        source: A path, a folder, a pattern such as "data/*.jsonl", a list of these, a name of the Hugging Face hub such
            as "org/name:train", a table or a list of dicts; see `lit-did docs data`.
        name: What errors call a source that is not a file.
        columns: Names of the source's columns by field, such as {"prompt": "question"}. None leaves a field out;
            {"prompt": None} says that the prompt is in both completions.
        on_bad_rows: What to do with rows that are well-formed but cannot be trained on (`UnusableRowError`): "skip"
            them, or "raise". Malformed rows always raise.
        warn: Called with a text if fields are read from columns of other names without `columns`, if no row has a
            prompt, and if a message has an unknown role.

    Returns:
        The rows in the order of the source, and those that were skipped.

    Raises:
        FileNotFoundError: If there is no such file, nor a data set of the hub.
        ConnectionError: If `source` is not a local file and the hub cannot be reached.
        TypeError: If `source` or an argument has an unknown type.
        ValueError: For malformed content, and for a source without pairs. The message begins with file and line (from
            1), or source and row (from 0).
        ImportError: For a .parquet file, if pyarrow is not installed.
    """
    check_choice("on_bad_rows", on_bad_rows, OnBadRows)
    check_columns(columns)
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
    rows: list[SourceRow] = []
    skipped: list[SkippedRow] = []

    def skip(index: int, where: str, error: UnusableRowError) -> None:
        if on_bad_rows == "raise":
            raise error
        skipped.append(SkippedRow(index, where, str(error).removeprefix(f"{where}: ")))

    layouts: dict[tuple[str, ...], None] = {}
    missing = {column for column in (columns or {}).values() if column is not None}
    for index, (where, row) in enumerate(read_raw(source, name, partial(columns_to_read, columns=columns))):
        try:
            rows.append(SourceRow(index, where, parse_row(row, where, columns)))
        except UnusableRowError as error:
            skip(index, where, error)
        layouts.setdefault(tuple(row))
        missing -= row.keys()
    if missing and (rows or skipped):
        raise ValueError(f"{name}: Expected the columns that `columns` names, but no row has {sorted(missing)}.")
    if found := "; or ".join(sorted({describe_columns(names, columns) for names in layouts} - {""})):
        warn(
            f"{name}: Reads {found}. To choose the columns, which also silences this warning, pass `columns`, such as "
            '{"prompt": "question"}.'
        )
    parsed, rows = rows, []
    certain = _repeats_prompts([row.pair for row in parsed])
    for row in parsed:
        try:
            rows.append(row._replace(pair=strip_repeated(row.pair, row.where, certain)))
        except UnusableRowError as error:
            skip(row.index, row.where, error)
    rows = _with_prompts(rows, name, skip, warn)
    _warn_of_roles(rows, warn)
    if not rows:
        if skipped:
            raise ValueError(f"{_described(name, skipped)} No row is left. Fix the rows.")
        raise ValueError(f"{name}: Expected preference pairs, but got none.")
    return rows, sorted(skipped)


def _with_prompts(rows: list[SourceRow], name: str, skip: Callable[..., None], warn: Warn) -> list[SourceRow]:
    """Skips plain-text rows without a prompt if others have one. If none has, it warns."""
    without = [row for row in rows if not row.pair.is_chat and not row.pair.texts[0].strip()]
    if len(without) == len(rows):
        if rows:
            warn(
                f"{name}: No row has a prompt, so only BOS precedes each answer. "
                'If a column holds the prompts, name it: `columns={"prompt": ...}`. If there are none, ignore this.'
            )
        return rows
    for row in without:
        error = unusable(row.where, "a prompt, as other rows have", "none, nor a beginning that both answers share")
        skip(row.index, row.where, error)
    left_out = {row.index for row in without}
    return [row for row in rows if row.index not in left_out]


def _warn_of_roles(rows: list[SourceRow], warn: Warn) -> None:
    """Warns of roles that chat templates seldom know. Some templates then write them out, others drop the message."""
    for row in rows:
        for message in chain(*row.pair.chats) if row.pair.is_chat else ():
            if message["role"] not in KNOWN_ROLES:
                warn(
                    f"{row.where}: A message has the role '{one_line(message['role'])}', which is not one of "
                    f"{in_words(KNOWN_ROLES)}. Some chat templates drop such messages, others write them out. Rename "
                    "the role, or look at the text with `PreferenceDataModule.preview()`. Later rows are not checked."
                )
                return


def _repeats_prompts(pairs: Sequence[PreferencePair]) -> bool:
    repeats = [num_repeats(*pair.texts) > 0 for pair in pairs if not pair.is_chat]
    return are_repeated(sum(repeats), len(repeats))


def describe_skipped(name: str, skipped: Sequence[SkippedRow], num_rows: int | None = None) -> str:
    """Says how many rows of a source were skipped, why, where, and what to do."""
    return f'{_described(name, skipped, num_rows)} Fix the rows, or pass `on_bad_rows="raise"` to stop at the first.'


def _described(name: str, skipped: Sequence[SkippedRow], num_rows: int | None = None) -> str:
    reasons = Counter(row.reason for row in skipped).most_common(3)
    lines = []
    for reason, count in reasons:
        places = [row.where for row in skipped if row.reason == reason]
        more = ", ..." if count > 3 else ""
        lines.append(f"{count} with the reason: {reason} ({'; '.join(places[:3])}{more})")
    others = len(skipped) - sum(count for _, count in reasons)
    if others:
        lines.append(f"{others} for other reasons.")
    one = len(skipped) == 1
    of = ("row" if one else "rows") if num_rows is None else f"of {num_rows} rows"
    return f"{name}: {len(skipped)} {of} cannot be trained on and {'is' if one else 'are'} skipped. {' '.join(lines)}"


def read_raw(source: Any, name: str, choose: Choose) -> Iterable[tuple[str, Any]]:
    """The raw rows of a source, each with what errors call it.

    Args:
        source: As for `read_rows`.
        name: What errors call a source that is not a file.
        choose: Chooses the columns to read from a table.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_path(os.fspath(source), choose)
    if isinstance(source, (list, tuple)):
        paths = [part for part in source if isinstance(part, (str, os.PathLike))]
        if not paths:
            return ((f"{name}, row {number}", row) for number, row in enumerate(source))
        if len(paths) < len(source):
            raise TypeError(f"Expected `{name}` to be a list of paths or a list of dicts, but got both in one.")
        return _read_paths(paths, name, choose)
    module = type(source).__module__.partition(".")[0]
    if module == "pyarrow" and type(source).__name__ in ("Table", "RecordBatch"):
        return read_table(source, name, choose)
    if module == "pandas" and hasattr(source, "columns"):
        return _read_frame(source, name, choose)
    splits = isinstance(source, dict) and hasattr(source, "column_names")  # a datasets.DatasetDict
    if module == "datasets" and hasattr(source, "select_columns") and not splits:
        return _read_dataset(source, name, choose)
    hint = f" of the splits {sorted(source)}; choose one" if splits else ""
    raise TypeError(
        f"Expected `{name}` to be a path, a list of paths or dicts, a datasets.Dataset, a pyarrow.Table or a pandas "
        f"DataFrame, but got {type(source).__name__}{hint}."
    )


def _read_path(path: str, choose: Choose) -> Iterator[tuple[str, Any]]:
    if not path:
        raise FileNotFoundError("Expected a path, but got an empty one.")
    if "://" in path:
        raise ValueError(
            f"{path}: Expected a path, or a name of the hub such as 'org/name:train', but got a URL. Download the "
            "file, or pass what `datasets.load_dataset` returns."
        )
    path = os.path.expanduser(path)
    if hub.is_hub_name(path):
        yield from _read_dataset(hub.load(path), path, choose)
        return
    for file in find_files(path):
        yield from read_file(file, choose)


def _read_paths(paths: Sequence[Any], name: str, choose: Choose) -> Iterator[tuple[str, Any]]:
    texts = [os.fspath(path) for path in paths]
    (most, count), *_ = Counter(texts).most_common(1)
    if count > 1:
        raise ValueError(f"{name}: Expected every path once, but got {most} {count} times.")
    for path in texts:
        yield from _read_path(path, choose)


def _read_dataset(dataset: Any, name: str, choose: Choose) -> Iterator[tuple[str, Any]]:
    if dataset.column_names is not None:  # a stream may not know its columns
        # Other columns, such as images, may be slow to decode.
        dataset = dataset.select_columns(choose(dataset.column_names, name))
    for number, row in enumerate(dataset.with_format(None)):
        yield f"{name}, row {number}", row


def _read_frame(frame: Any, name: str, choose: Choose) -> Iterator[tuple[str, Any]]:
    names = choose(list(frame.columns), name)
    columns = [frame[column].tolist() for column in names]
    for number, values in enumerate(zip(*columns, strict=True)):
        yield f"{name}, row {number}", dict(zip(names, map(_plain, values), strict=True))


def _plain(value: Any) -> Any:
    """A value of a data frame in Python's own types: arrays become lists, and missing values None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if missing else value
