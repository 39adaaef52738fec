"""What the package's commands share: an error that the user can correct, and the folder that they write to."""

from __future__ import annotations

import tempfile
from pathlib import Path


class InputError(Exception):
    """Something that the user gave cannot be used; the message is for them."""


def make_parent(folder: Path, option: str = "--output") -> None:
    """Makes sure that `folder`, which the user gave as `option`, can be made later.

    Raises:
        InputError: It cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Expected {option} to be a folder, but {folder} is a file.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent):
            pass
    except OSError as error:
        raise InputError(f"Expected {option} to be a folder that can be made, but got {folder}: {error}") from error
