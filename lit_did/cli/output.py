"""What commands write: checks of its path, and a record of what is finished, so that a killed run goes on."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lit_did.cli.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def make_parent(path: Path, option: str = "--output", what: str = "folder") -> None:
    """Makes the parent of `path` and checks that files can be written there, so that `path` can be made later.

    Args:
        path: The output's path.
        option: The command's option that named it.
        what: What is to be made, "folder" or "file".

    Raises:
        InputError: `path` is of the other kind, or cannot be made.
    """
    if path.exists() and path.is_dir() != (what == "folder"):
        raise InputError(f"Expected {option} to be a {what}, but {path} is a {'file' if path.is_file() else 'folder'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"Expected {option} to be a {what} that can be made, but got {path}: {error}") from error


def check_new_file(path: Path, overwrite: bool) -> None:
    """Checks that a file can be written as --output says.

    Args:
        path: The file's path.
        overwrite: Whether a file may be there already.

    Raises:
        InputError: A file is there, or the path is a folder or cannot be made.
    """
    make_parent(path, what="file")
    if path.exists() and not overwrite:
        raise InputError(
            f"Expected --output to be a new file, but {path} exists. Choose another name, or pass --overwrite."
        )


def short_name(pairs: str) -> str:
    """What files about a source of pairs are called: its last part, without the endings of data files."""
    name = re.sub(r"(\.jsonl|\.ndjson|\.json|\.csv|\.tsv|\.parquet)?(\.gz)?$", "", Path(pairs).name)
    return re.sub(r"[^\w.-]+", "_", name) or "pairs"


class Finished:
    """The results that a run has finished so far, in a file, so that the same command goes on after a kill.

    The first line holds what the results depend on, each further line one result, as JSON. Floats keep all their bits.
    A line that a kill cut off is dropped. A file without results is written again. Use it in a `with` statement.

    Args:
        path: The file. Its folder exists.
        about: What the results depend on, such as arguments and digests of models: plain values of JSON.
        output: What the run writes at its end. If it is as new as `path`, that run was killed when it had finished,
            and its results are dropped.

    Raises:
        InputError: The file holds results of something else, or another run is writing it (not noticed on Windows).
    """

    def __init__(self, path: Path, about: Mapping[str, Any], output: Path | None = None) -> None:
        self.path = path
        self.results: list[Any] = []
        """the results so far, those of an earlier run first"""
        self._file = path.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(f"Expected no other run to write {path}, but one does. Wait until it has ended.") from None
        if output is not None and output.exists() and output.stat().st_mtime_ns >= path.stat().st_mtime_ns:
            self._file.truncate(0)
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        about = json.loads(json.dumps(about))
        try:
            saved, *self.results = map(json.loads, lines or [b"{}"])
            differing = [name for name in {**saved, **about} if saved.get(name) != about.get(name)]
        except (ValueError, AttributeError, TypeError):
            self._file.close()
            raise InputError(f"Expected {path} to hold the results of an earlier run, but it does not.") from None
        if not self.results:
            self._file.truncate(0)
            self._write(about)
            return
        self._file.truncate(sum(map(len, lines)))
        if differing:
            self._file.close()
            name = differing[0]
            raise InputError(
                f"Expected {name} to be {saved.get(name)!r}, as in the run that left its results in {path}, but got "
                f"{about.get(name)!r}. Run it with the same arguments to go on, or delete that file to start again."
            )

    def __enter__(self) -> Finished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, result: Any) -> None:
        """Adds a result, which is on disk when this returns."""
        self._write(result)
        self.results.append(result)

    def remove(self) -> None:
        """Deletes the file, once the run's output is written."""
        self.path.unlink(missing_ok=True)

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
