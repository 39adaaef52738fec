"""Errors of rows: one line each that begins with the row's place, such as its file and line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class UnusableRowError(ValueError):
    """A well-formed row that cannot be trained on, such as one with an empty answer. Readers may skip it."""


def malformed(where: str, expected: str, got: str) -> ValueError:
    """The error for a row in none of the known formats. It is always raised."""
    return ValueError(f"{where}: Expected {expected}, but got {got}.")


def unusable(where: str, expected: str, got: str) -> UnusableRowError:
    """The error for a well-formed row that cannot be trained on. Readers may skip the row."""
    return UnusableRowError(f"{where}: Expected {expected}, but got {got}.")


def kind(value: Any) -> str:
    """A value in words, for errors."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "a huge int"  # Python refuses to print integers of more than 4300 digits
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else type(value).__name__


def in_words(names: Iterable[Any]) -> str:
    """Names of columns for errors, such as "`a`, `b`"; at most twenty."""
    names = list(names)
    return ", ".join(f"`{one_line(name)}`" for name in names[:20]) + ", ..." * (len(names) > 20) or "no keys"


def one_line(value: Any) -> str:
    """A text of the data for an error: one line of at most 100 characters that any terminal can show."""
    text = str(value) if len(str(value)) <= 100 else f"{str(value)[:100]}..."
    return text if text.isprintable() else ascii(text)[1:-1]
