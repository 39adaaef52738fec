"""Numbers for texts, so that equal texts are found without holding them side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lit_did.audit.source import AuditData, completion_keys


class Keys(NamedTuple):
    """Numbers of the texts of pairs: [pairs] int64. Texts that differ in case or whitespace alone have equal ones."""

    prompt: np.ndarray
    """`AuditData.prompt_keys`"""
    chosen: np.ndarray
    """`completion_keys`, as `rejected`"""
    rejected: np.ndarray


def read_keys(data: AuditData) -> Keys:
    """The numbers of all pairs."""
    sides = np.empty((2, len(data)), np.int64)
    for number, row in enumerate(data.rows):
        sides[:, number] = completion_keys(row.pair)
    return Keys(data.prompt_keys, *sides)


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
