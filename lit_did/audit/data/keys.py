"""Numbers for texts, so that equal texts are found without holding them side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lit_did.audit.source import AuditData
from lit_did.data.pairs import Text

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""keys of a message whose value templates put into a think block"""


class Keys(NamedTuple):
    """Numbers of the texts of pairs: [pairs] int64. Texts that differ in whitespace alone have equal ones.

    Python draws the numbers for each process, so that only their equality means something.
    """

    prompt: np.ndarray
    """of the prompt with system message and tools"""
    folded: np.ndarray
    """of the same, without regard to case"""
    chosen: np.ndarray
    rejected: np.ndarray


def read_keys(data: AuditData) -> Keys:
    """The numbers of all pairs."""
    found = np.empty((4, len(data)), np.int64)
    for number, row in enumerate(data.rows):
        prompt, chosen, rejected = data.texts(number)
        pair = row.pair
        prompt = _plain(prompt, pair.prompt)
        if pair.tools:
            prompt += repr(pair.tools)
        sides = (_plain(chosen, pair.chosen), _plain(rejected, pair.rejected))
        found[:, number] = [hash(prompt), hash(prompt.casefold()), *map(hash, sides)]
    return Keys(*found)


def thoughts(text: Text) -> list[Any]:
    """The values of messages that templates put into think blocks."""
    messages = [] if isinstance(text, str) else text
    return [message[key] for message in messages for key in THOUGHTS if key in message]


def in_order(keys: np.ndarray) -> np.ndarray:
    """Numbers from 0 for equal keys, in the order in which they first appear.

    Args:
        keys: [items] or [items, parts] int64.

    Example:
        >>> in_order(np.array([7, 3, 7, 5]))
        array([0, 1, 0, 2])
    """
    if keys.ndim > 1:
        numbers = in_order(keys[:, 0])
        for part in keys.T[1:]:
            other = in_order(part)
            numbers = in_order(numbers * (int(other.max(initial=0)) + 1) + other)
        return numbers
    _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[numbers]


def first_of(numbers: np.ndarray) -> np.ndarray:
    """[items]: where each item's number first appears."""
    _, first, places = np.unique(numbers, return_index=True, return_inverse=True)
    return first[places]


def _plain(text: str, raw: Text) -> str:
    words = " ".join(text.split())
    return f"{words}{found!r}" if (found := thoughts(raw)) else words
