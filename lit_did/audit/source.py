"""The data of an audit: its pairs as texts, the rows that were refused, and the source's other columns."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np

from lit_did.data.columns import read_columns
from lit_did.data.pairs import PreferencePair, Text
from lit_did.data.reading import Columns, SourceRow, read_rows

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""keys of a message whose value templates put into a think block"""
_PUNCTUATION = " .,;:!?\"'`…。？！"  # which does not count at the ends of prompts


class AuditData:
    """Preference pairs to audit. Reads what `PreferenceDataModule` reads.

    Args:
        source: Files, folders, patterns, a name of the Hugging Face hub, a table or a list of dicts; see
            `lit-did docs data`.
        name: What messages call a source that is not a file.
        columns: Names of the source's columns by field, such as {"prompt": "question"}.
        warn: Called with the text of each warning about the source.

    Attributes:
        column_names: As `columns` of the arguments.
        rows: The usable pairs, in the order of the source.
        skipped: The rows that cannot be trained on.
        num_rows: How many rows the source has.
    """

    def __init__(
        self,
        source: Any,
        name: str,
        *,
        columns: Columns | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.source, self.column_names = source, columns
        self.name = name = os.fspath(source) if isinstance(source, str | os.PathLike) else name
        self.rows: list[SourceRow]
        self.rows, self.skipped = read_rows(source, name, columns=columns, on_bad_rows="skip", warn=warn)
        self.num_rows = len(self.rows) + len(self.skipped)

    def __len__(self) -> int:
        """How many usable pairs there are."""
        return len(self.rows)

    def select(self, places: np.ndarray) -> AuditData:
        """The same source with some of its pairs, `rows[places]`."""
        part = copy(self)
        for name in ("row_numbers", "prompt_keys", "prompt_groups"):
            part.__dict__.pop(name, None)
        part.rows = [self.rows[place] for place in places.tolist()]
        return part

    @cached_property
    def columns(self) -> dict[int, dict[str, Any]]:
        """By row number in the source, the columns that are no part of the pair, such as sources and models."""
        return read_columns(self.source, self.name, columns=self.column_names)

    @property
    def tag_column(self) -> str | None:
        """The source's column of the tag, if it has one."""
        return (self.column_names or {}).get("tag", "tag")

    @cached_property
    def row_numbers(self) -> np.ndarray:
        """[pairs] int64, in the source."""
        return np.array([row.index for row in self.rows], dtype=np.int64)

    @cached_property
    def _wheres(self) -> dict[int, str]:
        places = {row.index: row.where for row in self.rows}
        return places | {row.index: row.where for row in self.skipped}

    @cached_property
    def _is_one_file(self) -> bool:
        first, comma, _ = next(iter(self._wheres.values())).rpartition(", ")
        return all(where.startswith(first + comma) for where in self._wheres.values())

    def where(self, row: int) -> str:
        """The file and line of the row with a number, or the source and the number."""
        return self._wheres[row]

    def called(self, row: int) -> str:
        """What sentences call the row with a number: its line in the file, as "line 1", or "row 0" of other sources.

        With several files, the file comes first.
        """
        return self.where(row).rpartition(", ")[2] if self._is_one_file else self.where(row)

    @cached_property
    def prompt_keys(self) -> np.ndarray:
        """[pairs] int64: equal numbers for equal prompts (`prompt_key`).

        Python draws the numbers for each process, so that only their equality means something.
        """
        return np.fromiter((hash(prompt_key(row.pair)) for row in self.rows), np.int64, len(self.rows))

    @cached_property
    def prompt_groups(self) -> np.ndarray:
        """[pairs] int64: equal numbers, from 0, for pairs of the same prompt (`prompt_keys`).

        Statistics and folds take the pairs of a prompt together. A pair without a prompt is alone with its copies.
        """
        numbers: dict[Any, int] = {}
        names = (
            key if has_prompt(row.pair) else frozenset(completion_keys(row.pair))
            for key, row in zip(self.prompt_keys.tolist(), self.rows, strict=True)
        )
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)

    def texts(self, number: int) -> tuple[str, str, str]:
        """The prompt, the chosen and the rejected completion of the pair `rows[number]`, each as one text."""
        pair = self.rows[number].pair
        return prompt_text(pair), as_text(pair.chosen), as_text(pair.rejected)


def prompt_text(pair: PreferencePair) -> str:
    """The prompt as one text, with the system message of a plain-text pair before it."""
    text = as_text(pair.prompt, roles=True)
    return text if pair.system is None else f"system: {pair.system}\n\n{text}"


def prompt_key(pair: PreferencePair) -> str:
    """What pairs of the same prompt have in common: its `folded` text without marks at the ends, thoughts and tools."""
    text = folded(prompt_text(pair))
    return (text.strip(_PUNCTUATION) or text) + _thoughts_key(pair.prompt) + (repr(pair.tools) if pair.tools else "")


def has_prompt(pair: PreferencePair) -> bool:
    """Whether anything but a system message comes before the completions."""
    if isinstance(pair.prompt, str):
        return bool(pair.prompt.strip())
    return bool(as_text([turn for turn in pair.prompt if turn["role"] != "system"]).strip())


def completion_keys(pair: PreferencePair) -> list[int]:
    """The numbers of both completions, equal for completions with the same `folded` text and the same thoughts.

    Where that makes both sides of the pair equal, case and accents count: they may be what the pair is about.
    """
    sides = (pair.chosen, pair.rejected)
    one, other = (folded(as_text(side)) + _thoughts_key(side) for side in sides)
    if one == other:
        one, other = (" ".join(as_text(side).split()) + _thoughts_key(side) for side in sides)
    return [hash(one), hash(other)]


def folded(text: str) -> str:
    """A text without regard to case, whitespace and how its accents are encoded.

    Example:
        >>> folded(" Wie  geht\\nES? ")
        'wie geht es?'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def _thoughts_key(text: Text) -> str:
    return repr(found) if (found := thoughts(text)) else ""


def thoughts(text: Text) -> list[Any]:
    """The values of messages that templates put into think blocks."""
    messages = [] if isinstance(text, str) else text
    return [message[key] for message in messages for key in THOUGHTS if key in message]


def as_text(text: Text, *, roles: bool = False) -> str:
    """Plain text as it is, or the messages of a chat, one after another.

    Args:
        text: The text or messages.
        roles: Whether a chat's messages begin with their role. Without it, only those after the first do.
    """
    if isinstance(text, str):
        return text
    parts: Sequence[str] = [
        (f"{message['role']}: " if roles or number else "")
        + message.get("content", "")
        + ("".join(f"\n{call}" for call in message.get("tool_calls", ())))
        for number, message in enumerate(text)
    ]
    return "\n\n".join(parts)
