"""Tokenised pairs in three flat arrays, which are in memory or in files."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_did.data.tokenizing import TokenizedPair

_TOKENS, _ENDS, _ROWS = "tokens.bin", "ends.npy", "row_numbers.npy"
_PARTS = 7  # the fields of an Example that hold arrays, with two arrays for each context
_COUNTED = np.array([2, 1, 1, 1, 0, 1, 0])  # how often a part's tokens are in a batch: a prompt is read twice


class ContextArrays(NamedTuple):
    """A `Context` as int32 arrays."""

    ids: np.ndarray
    places: np.ndarray


class Example(NamedTuple):
    """One pair as the collate functions take it: the ids of a `TokenizedPair` as int32 arrays."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    index: int  # type: ignore[assignment]  # a field may hide the method of tuples
    """row number in the source"""
    weight: float
    """1, or 0 for a row that only fills a batch"""
    chosen_context: ContextArrays | None = None
    rejected_context: ContextArrays | None = None


class TokensFile:
    """A file of int32 from which slices are read.

    It is not mapped into memory, because pages that were read would count as this process's memory. The system keeps
    them all the same. Processes that are forked may share the open file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return os.fstat(self._file).st_size // 4

    def __getitem__(self, part: slice) -> np.ndarray:
        values = np.empty(part.stop - part.start, dtype=np.int32)
        if os.preadv(self._file, [values.data], 4 * part.start) != values.nbytes:
            raise OSError(f"Expected {4 * part.stop:,} bytes in {self._path}, but it has become shorter.")
        return values


class FlatPairs(NamedTuple):
    """The arrays of many pairs. `flat_pairs` makes them."""

    tokens: np.ndarray | TokensFile
    """int32: the parts of all pairs, one after the other: prompt, chosen, rejected, ids and places of both contexts"""
    ends: np.ndarray
    """[pairs, 7] int64: where the parts end in `tokens`"""
    row_numbers: np.ndarray
    """[pairs] int64: the rows of the source"""

    def example(self, number: int, weight: float = 1.0) -> Example:
        """One pair. Its arrays are views of one array."""
        start, ends = int(self.ends[number - 1, -1]) if number else 0, self.ends[number]
        parts = np.split(self.tokens[start : int(ends[-1])], (ends[:-1] - start).tolist())
        prompt, chosen, rejected = parts[:3]
        contexts = (ContextArrays(*parts[place : place + 2]) if len(parts[place]) else None for place in (3, 5))
        return Example(prompt, chosen, rejected, int(self.row_numbers[number]), weight, *contexts)

    def num_tokens(self) -> np.ndarray:
        """The number of tokens of each pair, [pairs] int64: its prompt twice and both completions."""
        return np.diff(self.ends.reshape(-1), prepend=0).reshape(-1, _PARTS) @ _COUNTED

    def save(self, folder: Path) -> None:
        """Writes `ends` and `row_numbers` to a folder that has the tokens already."""
        np.save(folder / _ENDS, self.ends)
        np.save(folder / _ROWS, self.row_numbers)

    @classmethod
    def open(cls, folder: Path) -> FlatPairs:
        """Opens the files of a folder. `ends` and `row_numbers` are mapped into memory.

        Raises:
            OSError, ValueError: A file is missing or has the wrong size.
        """
        tokens = TokensFile(tokens_file(folder))
        ends, rows = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in (_ENDS, _ROWS))
        if ends.shape != (len(rows), _PARTS) or ends[-1, -1] != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for {len(rows)} pairs with the ends {ends[-1:].tolist()}")
        return cls(tokens, ends, rows)


def tokens_file(folder: Path) -> Path:
    """The file of a folder that holds the tokens."""
    return folder / _TOKENS


def lengths_of(pairs: Sequence[TokenizedPair]) -> np.ndarray:
    """The number of tokens of each part, [pairs, 7] int64."""
    return np.array([[len(part) for part in _parts(pair)] for pair in pairs], dtype=np.int64).reshape(-1, _PARTS)


def tokens_of(pairs: Iterable[TokenizedPair]) -> np.ndarray:
    """The parts of pairs, one after the other, as int32: 4 bytes a token, where a list takes up to 36."""
    return np.fromiter(chain.from_iterable(part for pair in pairs for part in _parts(pair)), dtype=np.int32)


def flat_pairs(tokens: np.ndarray, lengths: np.ndarray, row_numbers: np.ndarray) -> FlatPairs:
    """Makes FlatPairs from the lengths of the parts, [pairs, 7]."""
    return FlatPairs(tokens, np.cumsum(lengths, dtype=np.int64).reshape(-1, _PARTS), row_numbers)


def _parts(pair: TokenizedPair) -> tuple[list[int], ...]:
    contexts = [context or ([], []) for context in (pair.chosen_context, pair.rejected_context)]
    return (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, *contexts[0], *contexts[1])
