"""The sequences of a batch as NumPy arrays on the CPU: read from its tensors, selected, split into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_did.batches import IGNORE_INDEX


class Sequences(NamedTuple):
    """The sequences of a batch, without padding and without what follows the last completion token of each.

    Sequence i has the tokens from `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
    """

    input_ids: np.ndarray
    """[tokens] int64"""
    position_ids: np.ndarray
    """[tokens] int64"""
    labels: np.ndarray
    """[tokens] int64: `labels[t]` is the completion token that position t predicts, or -100"""
    cu_seqlens: np.ndarray
    """[sequences + 1] int64"""
    rests: tuple[np.ndarray, ...] = ()
    """For each sequence, [2, n] int64: the ids and positions of its last completion token and of what follows it. Only
    models whose results depend on the number of tokens in a sequence need them. Empty if nothing follows."""

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self.cu_seqlens) - 1

    @property
    def positions_count_from_zero(self) -> bool:
        """Whether `position_ids` count from 0 in every sequence."""
        lengths = np.diff(self.cu_seqlens)
        counted = np.arange(len(self.position_ids)) - np.repeat(self.cu_seqlens[:-1], lengths)
        return bool((self.position_ids == counted).all())

    @property
    def num_labels(self) -> int:
        """The number of completion tokens."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def cu_labels(self) -> np.ndarray:
        """[sequences + 1] int64: where each sequence's completion tokens begin and end, among all completion tokens."""
        before = np.concatenate([[0], (self.labels != IGNORE_INDEX).astype(np.int64).cumsum()])
        return before[self.cu_seqlens]

    @torch.compiler.disable  # NumPy on the CPU: nothing to compile
    def mean_chosen_labels(self, counted: Tensor | None = None) -> float:
        """The mean number of completion tokens of the chosen sequences, which are the first half.

        Args:
            counted: [pairs] bool, the pairs that count. None: all pairs.
        """
        chosen = np.diff(self.cu_labels)[: self.num_sequences // 2]
        chosen = chosen if counted is None else chosen[counted.cpu().numpy()]
        return float(chosen.mean()) if len(chosen) else 0.0

    def slice(self, index: int) -> slice:
        """The place of sequence `index` in the arrays."""
        return slice(int(self.cu_seqlens[index]), int(self.cu_seqlens[index + 1]))

    def select(self, indices: Sequence[int]) -> Sequences:
        """Some of the sequences, in the order of `indices`."""
        slices = [self.slice(i) for i in indices]

        def chosen(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array[s] for s in slices] or [array[:0]])

        return Sequences(
            input_ids=chosen(self.input_ids),
            position_ids=chosen(self.position_ids),
            labels=chosen(self.labels),
            cu_seqlens=_offsets([s.stop - s.start for s in slices]),
            rests=tuple(self.rests[i] for i in indices if self.rests),
        )

    def whole(self) -> Sequences:
        """The same sequences with `rests` appended, which have no labels."""
        if not self.rests:
            return self

        def appended(array: np.ndarray, rests: Sequence[np.ndarray]) -> np.ndarray:
            parts = ((array[self.slice(i)], rest) for i, rest in enumerate(rests))
            return np.concatenate([part for pair in parts for part in pair])

        ids, positions = ([rest[row] for rest in self.rests] for row in (0, 1))
        return Sequences(
            input_ids=appended(self.input_ids, ids),
            position_ids=appended(self.position_ids, positions),
            labels=appended(self.labels, [np.full(len(rest), IGNORE_INDEX) for rest in ids]),
            cu_seqlens=self.cu_seqlens + _offsets([len(rest) for rest in ids]),
        )


@torch.compiler.disable  # NumPy on the CPU, of other lengths in every batch: nothing to compile
def read_sequences(batch: Mapping[str, Tensor]) -> Sequences:
    """The sequences of a batch.

    Args:
        batch: `input_ids`, `labels` and `attention_mask` [sequences, T], padded on either side. Or `input_ids` and
            `labels` [1, tokens] with `cu_seqlens` [sequences + 1], end to end. `position_ids` of the same shape are
            optional. Without them, positions count from 0 in every sequence.
    """
    arrays = {n: batch[n].cpu().numpy() for n in ("input_ids", "labels", "position_ids") if n in batch}
    shape = arrays["input_ids"].shape
    flat = {name: np.broadcast_to(array, shape).reshape(-1) for name, array in arrays.items()}
    if "cu_seqlens" in batch:
        places = [np.arange(start, stop) for start, stop in pairwise(batch["cu_seqlens"].tolist())]
    else:
        present = (batch["attention_mask"] != 0).cpu().numpy()  # NumPy has no bfloat16
        places = [row * shape[1] + present[row].nonzero()[0] for row in range(shape[0])]
    kept, following = [], []
    for place in places:
        labelled = (flat["labels"][place] != IGNORE_INDEX).nonzero()[0]
        # Nothing after the last labelled position is needed. A sequence without labels keeps one token.
        end = labelled[-1] + 1 if len(labelled) else 1
        kept.append(place[:end])
        following.append(place[end:] if len(labelled) else place[:0])
    if "position_ids" not in flat:
        positions = np.zeros(flat["input_ids"].shape, dtype=np.int64)
        for own in places:
            positions[own] = np.arange(len(own))
        flat["position_ids"] = positions
    place = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
    return Sequences(
        input_ids=flat["input_ids"][place],
        position_ids=flat["position_ids"][place],
        labels=flat["labels"][place],
        cu_seqlens=_offsets([len(own) for own in kept]),
        rests=tuple(np.stack([flat["input_ids"][own], flat["position_ids"][own]]) for own in following),
    )


@torch.compiler.disable
def split_pairs(sequences: Sequences, tokens: int) -> list[Sequences]:
    """Splits pairs into the fewest micro-batches of at most `tokens` tokens, of even sizes, in the order of the pairs.

    Args:
        sequences: The chosen sequences, then the rejected ones in the same order.
        tokens: The limit. A pair that has more tokens is a micro-batch of its own.
    """
    pairs = sequences.num_sequences // 2
    lengths = np.diff(sequences.cu_seqlens)
    of_pairs = lengths[:pairs] + lengths[pairs:]

    def fill(limit: int) -> list[list[int]]:
        parts: list[list[int]] = []
        room = 0
        for pair in range(pairs):
            if not parts or of_pairs[pair] > room:
                parts.append([])
                room = limit
            parts[-1].append(pair)
            room -= of_pairs[pair]
        return parts

    parts = fill(tokens)
    while True:
        largest = max(parts, key=lambda part: of_pairs[part].sum(), default=[])
        evener = fill(of_pairs[largest].sum() - 1)
        if len(largest) < 2 or len(evener) > len(parts):
            break
        parts = evener
    return [sequences.select([*part, *(pairs + pair for pair in part)]) for part in parts]


def split_into(sequences: Sequences, parts: int) -> list[Sequences]:
    """Splits pairs into `parts` micro-batches of about equally many tokens, in the order of the pairs.

    Args:
        sequences: The chosen sequences, then the rejected ones in the same order.
        parts: At most the number of pairs.
    """
    pairs = sequences.num_sequences // 2
    lengths = np.diff(sequences.cu_seqlens)
    starts = np.append(0, np.cumsum(lengths[:pairs] + lengths[pairs:]))
    numbers = np.arange(1, parts)
    cuts = np.abs(starts - starts[-1] * numbers[:, None] / parts).argmin(1)  # the nearest places
    # At least one pair each: cuts rise, and leave a pair for each part before and after.
    cuts = np.clip(np.maximum.accumulate(cuts - numbers) + numbers, numbers, pairs - parts + numbers)
    return [sequences.select([*part, *(pairs + part)]) for part in np.split(np.arange(pairs), cuts)]


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    """[n + 1] int64: 0 and the cumulative sums."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
