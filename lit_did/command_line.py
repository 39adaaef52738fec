"""Shared by the package's commands: the error for unusable input, and the check of the output folder."""

from __future__ import annotations

import tempfile
from pathlib import Path


class InputError(Exception):
    """The user's input cannot be used. Commands print the message without a traceback."""


def make_parent(folder: Path, option: str = "--output") -> None:
    """Makes the parent of `folder` and checks that files can be written there, so that `folder` can be made later.

    Args:
        folder: The output folder.
        option: The command's option that named it.

    Raises:
        InputError: `folder` is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Expected {option} to be a folder, but {folder} is a file.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent):
            pass
    except OSError as error:
        raise InputError(f"Expected {option} to be a folder that can be made, but got {folder}: {error}") from error
