"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and moves it to `path` when the block ends without an error."""
    beside = path.with_name(f".{path.name}.writing{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to make a folder at, and moves it to `path` when the block ends without an error.

    A folder that is at `path` by then is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as work:
        finished = Path(work) / path.name
        yield finished
        if path.exists():
            path.rename(Path(work) / f"{path.name}.before")
        finished.rename(path)
