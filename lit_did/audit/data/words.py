"""Turns texts into numbers of words, many texts at once: what counts, compares and classifies the texts of an audit.

A word is a run of letters and digits in lower case, a Chinese, Japanese or Korean character, an emoji, or a single
punctuation mark. Whitespace separates words and is no word. All is numpy on bytes, because a large data set has
hundreds of millions of words. Equal words have equal 64-bit numbers. Different words have different ones, but for a
chance of 1 in 2^64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 19
"""about how many characters are turned into words at once, so that the arrays fit into the cache of the processor"""

_SPACE, _WORD, _WIDE, _MARK, _CONTINUED = range(5)
_KIND = np.full(256, _MARK, np.uint8)  # of a byte of UTF-8
_KIND[:33] = _KIND[127] = _SPACE
_KIND[[byte for byte in range(128) if chr(byte).isalnum()]] = _WORD
_KIND[0x80:0xC0] = _CONTINUED
_KIND[0xC0:0xE0] = _WORD  # the first of two bytes: letters of Europe and the Near East
_KIND[0xE0:] = _WIDE  # the first of three or four
_STARTS_WORD = np.isin(_KIND, [_WIDE, _MARK])
_IN_WORD = _KIND == _WORD
_ENDS_WORD = np.isin(_KIND, [_SPACE, _MARK])

_rng = np.random.default_rng(20250523)
_VALUE = _rng.integers(1 << 63, size=256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_VALUE[_KIND == _SPACE] = 0
_VALUE[ord("A") : ord("Z") + 1] = _VALUE[ord("a") : ord("z") + 1]
_FACTOR = 0x9E3779B97F4A7C15
_START = np.uint64(0x2545F4914F6CDD1D)


class Words(NamedTuple):
    """The words of some texts."""

    numbers: np.ndarray
    """[words] uint64, text after text"""
    offsets: np.ndarray
    """[texts + 1] int64: where each text starts in `numbers`"""
    is_mark: np.ndarray
    """[words] bool: whether a word is a punctuation mark"""

    @property
    def lengths(self) -> np.ndarray:
        """[texts] int64: how many words each text has, without punctuation marks."""
        return np.diff(np.concatenate([[0], np.cumsum(~self.is_mark)])[self.offsets])

    @property
    def without_marks(self) -> Words:
        """The same texts without punctuation marks."""
        kept = ~self.is_mark
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.offsets]
        return Words(self.numbers[kept], offsets, np.zeros(int(offsets[-1]), bool))

    @property
    def shingles(self) -> np.ndarray:
        """[words] uint64: each word with the one before it in its text."""
        before = np.empty_like(self.numbers)
        before[1:] = self.numbers[:-1]
        before[self.offsets[:-1][np.diff(self.offsets) > 0]] = _START
        return mix(before * np.uint64(_FACTOR) + self.numbers)


def words_of(texts: Sequence[str]) -> Words:
    """The words of texts. Give about `CHUNK` characters at once."""
    # `_VALUE` makes ASCII letters lower case.
    encoded = [(text if text.isascii() else text.lower()).encode() for text in texts]
    joined = np.frombuffer(b"\n".join(encoded) + b"\n", np.uint8)
    places = np.cumsum([0, *(len(text) + 1 for text in encoded)])
    starts_word = _STARTS_WORD[joined]
    starts_word[0] |= _IN_WORD[joined[0]]
    starts_word[1:] |= _IN_WORD[joined[1:]] & _ENDS_WORD[joined[:-1]]
    starts = np.flatnonzero(starts_word)
    # The number of a word is the sum of value * power of its bytes, divided by the power of its first byte.
    powers, inverses = _powers(len(joined))
    values = _VALUE[joined]
    values *= powers
    numbers = np.add.reduceat(values, starts) * inverses[starts] if len(starts) else np.empty(0, np.uint64)
    return Words(mix(numbers), np.searchsorted(starts, places), _KIND[joined[starts]] == _MARK)


def mix(numbers: np.ndarray) -> np.ndarray:
    """Spreads the bits of 64-bit numbers, one to one."""
    numbers = numbers ^ (numbers >> np.uint64(32))
    numbers *= np.uint64(0xD6E8FEB86659FD93)
    numbers ^= numbers >> np.uint64(32)
    numbers *= np.uint64(0xD6E8FEB86659FD93)
    numbers ^= numbers >> np.uint64(32)
    return numbers


def chunks(lengths: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ranges of items that together have about `CHUNK` characters.

    Args:
        lengths: The number of characters of each item.
    """
    start, total, stop = 0, 0, 0
    for length in lengths:
        stop, total = stop + 1, total + length
        if total >= CHUNK:
            yield start, stop
            start, total = stop, 0
    if stop > start:
        yield start, stop


_tables: list[np.ndarray] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(count: int) -> list[np.ndarray]:
    """The first `count` powers of an odd number modulo 2^64, and of its inverse."""
    if len(_tables[0]) < count:
        for place, base in enumerate((_FACTOR, pow(_FACTOR, -1, 1 << 64))):
            factors = np.full(2 * count, base, np.uint64)
            factors[0] = 1
            _tables[place] = np.cumprod(factors)
    return [table[:count] for table in _tables]
