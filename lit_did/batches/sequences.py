"""The sequences of a batch, as NumPy arrays on the CPU: read from its tensors, selected, split by tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_did.batches import IGNORE_INDEX


class Sequences(NamedTuple):
    """The sequences of a batch on the CPU, without padding and without what follows their last completion token.

    Arrays [tokens] int64, sequence i from `cu_seqlens[i]` to `cu_seqlens[i + 1]`; `labels[t]` is the token that
    position t predicts, or -100.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    rests: tuple[np.ndarray, ...] = ()
    """[2, n] int64 a sequence: the ids and positions of what follows, the last completion token and what is after it.
    For models whose answers depend on how many tokens a sequence has. (): nothing follows."""

    @property
    def num_sequences(self) -> int:
        """How many."""
        return len(self.cu_seqlens) - 1

    @property
    def positions_count_from_zero(self) -> bool:
        """Whether `position_ids` count from 0 in every sequence."""
        lengths = np.diff(self.cu_seqlens)
        counted = np.arange(len(self.position_ids)) - np.repeat(self.cu_seqlens[:-1], lengths)
        return bool((self.position_ids == counted).all())

    @property
    def num_labels(self) -> int:
        """How many completion tokens."""
        return int((self.labels != IGNORE_INDEX).sum())

    @torch.compiler.disable  # NumPy on the CPU: nothing to compile
    def mean_chosen_labels(self, counted: Tensor | None = None) -> float:
        """How many completion tokens a chosen sequence, one of the first half, has on average.

        `counted`: [pairs] bool, the pairs that count; None: all.
        """
        before = np.concatenate([[0], (self.labels != IGNORE_INDEX).astype(np.int64).cumsum()])
        chosen = np.diff(before[self.cu_seqlens])[: self.num_sequences // 2]
        chosen = chosen if counted is None else chosen[counted.cpu().numpy()]
        return float(chosen.mean()) if len(chosen) else 0.0

    def slice(self, index: int) -> slice:
        """Where sequence `index` lies."""
        return slice(int(self.cu_seqlens[index]), int(self.cu_seqlens[index + 1]))

    def select(self, indices: Sequence[int]) -> Sequences:
        """Some of them, in the order of `indices`."""
        slices = [self.slice(i) for i in indices]
        lengths = [s.stop - s.start for s in slices]
        arrays = (np.concatenate([a[s] for s in slices] or [a[:0]]) for a in self[:3])
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Sequences(*arrays, cu_seqlens, tuple(self.rests[i] for i in indices if self.rests))

    def whole(self) -> Sequences:
        """The same with `rests`, without labels there, appended to each sequence."""
        if not self.rests:
            return self
        parts: list[list[np.ndarray]] = [[], [], []]
        for index, (ids, positions) in enumerate(self.rests):
            own = self.slice(index)
            nothing = np.full(len(ids), IGNORE_INDEX)
            for values, array, rest in zip(parts, self[:3], (ids, positions, nothing), strict=True):
                values += [array[own], rest]
        added = np.array([rest.shape[1] for rest in self.rests]).cumsum()
        cu_seqlens = self.cu_seqlens + np.concatenate([[0], added])
        return Sequences(*map(np.concatenate, parts), cu_seqlens)


@torch.compiler.disable  # NumPy on the CPU, of other lengths in every batch: nothing to compile
def read_sequences(batch: Mapping[str, Tensor]) -> Sequences:
    """The sequences of a batch.

    Args:
        batch: `input_ids`, `labels` and `attention_mask` [sequences, T], padded on either side; or `input_ids` and
            `labels` [1, tokens] with `cu_seqlens` [sequences + 1], end to end. `position_ids` of the same shape may be
            absent: they count from 0 in every sequence.
    """
    arrays = {n: batch[n].cpu().numpy() for n in ("input_ids", "labels", "position_ids") if n in batch}
    shape = arrays["input_ids"].shape
    flat = {name: np.broadcast_to(array, shape).reshape(-1) for name, array in arrays.items()}
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].tolist()
        places = [np.arange(start, stop) for start, stop in pairwise(bounds)]
    else:
        present = (batch["attention_mask"] != 0).cpu().numpy()  # NumPy has no bfloat16
        places = [row * shape[1] + present[row].nonzero()[0] for row in range(shape[0])]
    kept, rest = [], []
    for place in places:
        labelled = (flat["labels"][place] != IGNORE_INDEX).nonzero()[0]
        # Nothing is asked of what follows the last labelled position. A sequence without labels keeps one token.
        end = labelled[-1] + 1 if len(labelled) else 1
        kept.append(place[:end])
        rest.append(place[end:] if len(labelled) else place[:0])
    lengths = np.array([len(place) for place in kept], dtype=np.int64)
    place = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
    cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    if "position_ids" not in flat:
        positions = np.zeros(flat["input_ids"].shape, dtype=np.int64)
        for own in places:
            positions[own] = np.arange(len(own))
        flat["position_ids"] = positions
    rests = tuple(np.stack([flat[name][own] for name in ("input_ids", "position_ids")]) for own in rest)
    return Sequences(*(flat[name][place] for name in ("input_ids", "position_ids", "labels")), cu_seqlens, rests)


@torch.compiler.disable
def split_pairs(sequences: Sequences, tokens: int) -> list[Sequences]:
    """Pairs (sequence i and the one half of all after it) in as few parts of at most so many tokens as can be.

    The largest is then as small as it can be; a part has a pair at least.
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
