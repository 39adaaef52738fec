"""Writes an audit as a folder: the page, the table of pairs, the figures, and the rows of each flag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_did.audit.report import Finding
from lit_did.audit.source import AuditData
from lit_did.data.reading import read_raw
from lit_did.scoring.table import write_table
from lit_did.writing import whole_folder

if TYPE_CHECKING:
    from lit_did.audit.running import Audit

PAGE, TABLE, FIGURES, FLAGS_FOLDER = "audit.html", "pairs.csv", "audit.json", "flags"


def check_folder(folder: Path, overwrite: bool, argument: str) -> None:
    """Checks that an audit can be written to `folder`.

    Args:
        folder: The folder.
        overwrite: Whether the audit that is there may be replaced.
        argument: What errors call `folder`.

    Raises:
        FileExistsError: There is something else, or an audit and not `overwrite`.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"Expected {argument} to be a folder, but {folder} is a link or a file.")
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    others = sorted({*found} - {PAGE, TABLE, FIGURES, FLAGS_FOLDER})
    if others:
        raise FileExistsError(
            f"Expected {argument} to be a new folder or that of an audit, but {folder} holds {others[0]}. Choose "
            "another name."
        )
    if found and not overwrite:
        raise FileExistsError(
            f"Expected {argument} to be a new folder, but {folder} exists. Choose another name, or pass "
            f"{'--overwrite' if argument.startswith('--') else '`overwrite=True`'}."
        )


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

    check_folder(folder, overwrite, argument)
    with whole_folder(folder) as beside:
        beside.mkdir()
        (beside / PAGE).write_text(render(audit), encoding="utf-8", errors="backslashreplace")
        write_table(audit.table(), beside / TABLE)
        figures = json.dumps(audit.figures(), indent=1, ensure_ascii=False, allow_nan=False)
        (beside / FIGURES).write_text(figures + "\n", encoding="utf-8", errors="backslashreplace")
        write_rows(audit.data, audit.raised, beside / FLAGS_FOLDER)
        check_folder(folder, overwrite, argument)  # somebody may have written there meanwhile
        files = sorted(path.relative_to(beside) for path in beside.rglob("*") if path.is_file())
    return [folder / path for path in files]


def write_rows(data: AuditData, findings: Sequence[Finding], folder: Path) -> None:
    """Writes the source's rows of each finding to `folder/NAME`, unchanged and in their order.

    flagged.jsonl has the finding's rows. kept.jsonl has all rows that were not refused, without those that it drops.
    Rows that were not audited, because of `max_pairs`, are kept.

    Raises:
        ValueError: The source has changed since it was read.
    """
    findings = [finding for finding in findings if len(finding.rows)]
    refused = {row.index for row in data.skipped}
    flagged = [set(map(int, finding.rows)) for finding in findings]
    dropped = [
        refused | (rows if finding.dropped is None else set(map(int, finding.dropped)))
        for finding, rows in zip(findings, flagged, strict=True)
    ]
    if not findings:
        return
    number = -1
    with ExitStack() as stack:
        files = []
        for finding in findings:
            (folder / finding.name).mkdir(parents=True)
            names = ("flagged", "kept")
            files.append([stack.enter_context((folder / finding.name / f"{name}.jsonl").open("wb")) for name in names])
        for number, (_, row) in enumerate(read_raw(data.source, data.name, lambda names, _: names)):
            line = _line(row)
            for (of_flagged, of_kept), is_flagged, is_dropped in zip(files, flagged, dropped, strict=True):
                if number in is_flagged:
                    of_flagged.write(line)
                if number not in is_dropped:
                    of_kept.write(line)
    if number + 1 != data.num_rows:
        raise ValueError(
            f"{data.name}: Expected {data.num_rows} rows, as before, but got {number + 1}. The data changed during the "
            "audit. Run it again."
        )


def _line(row: Any) -> bytes:
    """A row as JSON. What JSON has no value for, such as a date, is text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return json.dumps(row, default=str).encode() + b"\n"
