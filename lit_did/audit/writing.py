"""Writes an audit as a folder: the page, the table of pairs, the figures, and the rows of each flag."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_did.audit.report import Finding
from lit_did.audit.source import AuditData
from lit_did.data.errors import UnusableRowError
from lit_did.data.pairs import parse_row
from lit_did.data.prompts import are_repeated, num_repeats, surely_repeats
from lit_did.data.reading import Columns, read_raw
from lit_did.scoring.table import write_table
from lit_did.writing import whole_folder

if TYPE_CHECKING:
    from lit_did.audit.running import Audit

PAGE, TABLE, FIGURES, FLAGS_FOLDER = "audit.html", "pairs.csv", "audit.json", "flags"


def check_folder(folder: Path, overwrite: bool, argument: str, sources: Sequence[Any] = ()) -> None:
    """Checks that an audit can be written to `folder`.

    Args:
        folder: The folder.
        overwrite: Whether the audit that is there may be replaced.
        argument: What errors call `folder`.
        sources: The data, which may not be in the folder.

    Raises:
        FileExistsError: There is something else, or an audit and not `overwrite`.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"Expected {argument} to be a folder, but {folder} is a link or a file.")
    place = folder.resolve()
    found = {path.name for path in place.iterdir()} if place.exists() else set()
    is_audit = found >= {PAGE, FIGURES}
    others = sorted(found - {PAGE, TABLE, FIGURES, FLAGS_FOLDER} if is_audit else found)
    if others:
        raise FileExistsError(
            f"Expected {argument} to be a new folder or that of an audit, but {folder} holds {others[0]}. Choose "
            "another name."
        )
    if held := _held(place, sources):
        raise FileExistsError(
            f"Expected {argument} to be a folder without the data, but {folder} holds {held}. Choose another name."
        )
    if place.exists() and place in (here := Path.cwd(), *here.parents):
        raise FileExistsError(
            f"Expected {argument} to be a folder that can be replaced as a whole, but {folder} is the folder that you "
            "are in. Choose another name."
        )
    if found and not overwrite:
        raise FileExistsError(
            f"Expected {argument} to be a new folder, but {folder} exists. Choose another name, or pass "
            f"{'--overwrite' if argument.startswith('--') else '`overwrite=True`'}."
        )


def _held(folder: Path, sources: Sequence[Any]) -> str | None:
    """A path of the data that is in the folder, or is the folder."""
    for source in sources:
        for part in source if isinstance(source, list | tuple) else [source]:
            if isinstance(part, str | os.PathLike):
                path = os.fspath(part)
                for found in (path, *glob.glob(path, recursive=True)):
                    if folder in (whole := Path(found).resolve(), *whole.parents):
                        return found
    return None


def write_audit(audit: Audit, folder: Path, overwrite: bool, argument: str) -> list[Path]:
    """Writes the folder, which appears whole or not at all.

    Args:
        audit: The audit.
        folder: The folder.
        overwrite: Whether the audit that is there may be replaced.
        argument: What errors call `folder`.

    Returns:
        The files.
    """
    from lit_did.audit.page import render

    sources = (audit.data.source, audit.val_source)
    check_folder(folder, overwrite, argument, sources)
    with whole_folder(folder.resolve()) as beside:
        beside.mkdir()
        (beside / PAGE).write_text(render(audit), encoding="utf-8", errors="backslashreplace")
        write_table(audit.table(), beside / TABLE)
        figures = json.dumps(audit.figures(), indent=1, ensure_ascii=False, allow_nan=False)
        (beside / FIGURES).write_text(figures + "\n", encoding="utf-8", errors="backslashreplace")
        write_rows(audit.data, audit.raised, beside / FLAGS_FOLDER)
        check_folder(folder, overwrite, argument, sources)  # somebody may have written there meanwhile
        files = sorted(path.relative_to(beside) for path in beside.rglob("*") if path.is_file())
    return [folder / path for path in files]


def write_rows(data: AuditData, findings: Sequence[Finding], folder: Path) -> None:
    """Writes the source's rows of each finding to `folder/NAME`, unchanged and in their order.

    flagged.jsonl has the finding's rows, and flagged.csv says of each where it is in the source and what speaks for
    the finding. kept.jsonl has all rows that were not refused, without those that it drops. Rows that models did not
    read, because of `max_pairs`, are kept. One warning names files that would be read otherwise than the source.

    Raises:
        ValueError: The source has changed since it was read.
    """
    findings = [finding for finding in findings if len(finding.rows)]
    if not findings:
        return
    refused = {row.index for row in data.skipped}
    whole, number = _Rows(None, lambda row: True), -1
    with ExitStack() as stack:
        files = []
        for finding in findings:
            (folder / finding.name).mkdir(parents=True)
            flagged = set(map(int, finding.rows))
            index = sorted(flagged)
            places = [data.where(row) for row in index]
            evidence = [finding.evidence.get(row) for row in index]
            write_table({"index": index, "where": places, "evidence": evidence}, folder / finding.name / "flagged.csv")
            dropped = refused | (flagged if finding.dropped is None else set(map(int, finding.dropped)))
            for name, holds in (("flagged", flagged.__contains__), ("kept", lambda row, left=dropped: row not in left)):
                file = stack.enter_context((folder / finding.name / f"{name}.jsonl").open("wb"))
                files.append(_Rows(file, holds))
        for number, (where, row) in enumerate(read_raw(data.source, data.name, lambda names, _: names)):
            line, repeats = _line(row), _repeats(row, where, data.column_names)
            for rows in (whole, *files):
                rows.add(number, line, repeats)
    if number + 1 != data.num_rows:
        raise ValueError(
            f"{data.name}: Expected {data.num_rows} rows, as before, but got {number + 1}. The data changed during the "
            "audit. Run it again."
        )
    if others := [Path(rows.file.name) for rows in files if rows.reads_otherwise_than(whole)]:
        warnings.warn(
            f"{', '.join(str(path.relative_to(folder)) for path in others)}: Some completions begin with their prompt. "
            f"Readers decide by the share of such rows whether to remove it, and these files have another share than "
            f"{data.name}. So these rows would be read otherwise. Choose the rows from {data.name} instead, by `index` "
            f"and `flags` in {TABLE}.",
            stacklevel=2,
        )


class _Rows:
    """The rows of one file, and how a reader takes completions that begin with the prompt."""

    def __init__(self, file: Any, holds: Callable[[int], bool]) -> None:
        self.file, self.holds = file, holds
        self.num_rows = self.num_repeating = self.num_uncertain = 0

    def add(self, number: int, line: bytes, repeats: tuple[bool, bool] | None) -> None:
        """Writes a row if it is one of this file's.

        Args:
            number: Its number.
            line: Its content.
            repeats: From `_repeats`.
        """
        if not self.holds(number):
            return
        if self.file is not None:
            self.file.write(line)
        if repeats is not None:
            self.num_rows += 1
            self.num_repeating += repeats[0]
            self.num_uncertain += repeats[1]

    def reads_otherwise_than(self, whole: _Rows) -> bool:
        """Whether readers take rows of this file otherwise than in the whole source."""
        here, there = (are_repeated(rows.num_repeating, rows.num_rows) for rows in (self, whole))
        return here != there and self.num_uncertain > 0


def _repeats(row: Any, where: str, columns: Columns | None) -> tuple[bool, bool] | None:
    """Whether a completion begins with the prompt, and whether only the whole source shows if it repeats it.

    None: the row is a chat or cannot be trained on.
    """
    try:
        pair = parse_row(row, where, columns)
    except UnusableRowError:
        return None
    if pair.is_chat:
        return None
    repeats = num_repeats(*pair.texts)
    return repeats > 0, repeats > 0 and not surely_repeats(pair.texts[0], repeats)


def _line(row: Any) -> bytes:
    """A row as JSON. What JSON has no value for, such as a date, is text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return json.dumps(row, default=str).encode() + b"\n"
