"""How the sequences of a batch lie in what a model is given: end to end without padding, common beginnings once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.sequences import Sequences

SHORTEST_SHARED = 8  # tokens: attending to a shared beginning costs more than encoding so few again


class Layout(NamedTuple):
    """What a model is given, and where in it are the positions that predict completion tokens."""

    inputs: dict[str, Any]
    """the model's arguments: `input_ids` [rows, T] int64, `position_ids`, `attention_mask`"""
    rows: Tensor
    """[completion tokens] int64: the position in [rows * T] that predicts each, sequence after sequence. A shared
    position, such as a prompt's last, stands once for each sequence."""
    labels: Tensor
    """[completion tokens] int64: the tokens"""
    cu_labels: Tensor
    """[sequences + 1] int64: where each sequence's begin and end"""
    kind: str = "padded"
    """"packed", "padded", or "alone": rows as in "padded", but each is given to the model by itself, without padding"""
    packing: str | None = None
    """how a packed row's sequences are kept apart, see `lit_did.models.attention.packings`"""
    forgets: bool = False
    """whether one token is given to the model before each row, so that it forgets the row before"""


def padded_layout(sequences: Sequences, device: torch.device) -> Layout:
    """A row a sequence, padded on the right."""
    lengths = np.diff(sequences.cu_seqlens)
    shape = (sequences.num_sequences, int(lengths.max(initial=1)))
    present = np.arange(shape[1]) < lengths[:, None]  # row after row: the order of the tokens

    def padded(values: np.ndarray, fill: int) -> np.ndarray:
        result = np.full(shape, fill, dtype=np.int64)
        result[present] = values
        return result

    labels = padded(sequences.labels, IGNORE_INDEX)
    inputs = {
        # Any id will do: nothing attends to it. The sequence's own are in the vocabulary.
        "input_ids": _tensor(padded(sequences.input_ids, int(sequences.input_ids[:1].sum())), device),
        "attention_mask": _tensor(present, device),
    }
    if not sequences.positions_count_from_zero:  # else models count for themselves
        inputs["position_ids"] = _tensor(padded(sequences.position_ids, 0), device)
    labelled = labels != IGNORE_INDEX
    return Layout(
        inputs,
        rows=_tensor(labelled.reshape(-1).nonzero()[0], device),
        labels=_tensor(labels[labelled], device),
        cu_labels=_tensor(np.concatenate([[0], labelled.sum(1).cumsum()]), device),
    )


def packed_layout(sequences: Sequences, device: torch.device, *, share: bool) -> Layout:
    """All sequences end to end in one row; `attention_mask` holds the segments, [1, 1, segments, 2] int64 on the CPU.

    A segment is what lies between two of its boundaries: its length, and the segment before it that it continues, or
    -1. `lit_did.models.attention` reads them.

    Args:
        share: What sequence i and the one half of all sequences after it begin with in common (a pair's prompt, and
            as much of its completions) is laid down once, and continued by both.
    """
    pieces: list[slice] = []  # of the sequences' tokens: a segment each
    continues: list[int] = []
    parts_of: list[list[int]] = [[] for _ in range(sequences.num_sequences)]  # the segments that make each sequence

    def lay(start: int, stop: int, before: int, of: tuple[int, ...]) -> None:
        if stop > start:
            for sequence in of:
                parts_of[sequence].append(len(pieces))
            pieces.append(slice(start, stop))
            continues.append(before)

    pairs = sequences.num_sequences // 2 if share and sequences.num_sequences % 2 == 0 else 0
    for first, second in zip(range(pairs), range(pairs, 2 * pairs), strict=True):
        one, other = sequences.slice(first), sequences.slice(second)
        common = _common_beginning(sequences, one, other)
        before = len(pieces) if common else -1
        lay(one.start, one.start + common, -1, (first, second))
        lay(one.start + common, one.stop, before, (first,))
        lay(other.start + common, other.stop, before, (second,))
    for sequence in range(2 * pairs, sequences.num_sequences):
        own = sequences.slice(sequence)
        lay(own.start, own.stop, -1, (sequence,))

    order = np.concatenate([np.arange(p.start, p.stop) for p in pieces] or [np.empty(0, dtype=np.int64)])
    lengths = np.array([p.stop - p.start for p in pieces], dtype=np.int64)
    places = np.split(np.arange(len(order)), lengths.cumsum()[:-1])
    rows, labels = [], []
    for sequence, parts in enumerate(parts_of):
        own = sequences.labels[sequences.slice(sequence)]
        labels.append(own[own != IGNORE_INDEX])
        of_sequence = [places[part] for part in parts] or [order[:0]]  # none of one without tokens
        rows.append(np.concatenate(of_sequence)[own != IGNORE_INDEX])
    segments = np.stack([lengths, np.array(continues, dtype=np.int64)], axis=1)
    inputs = {
        "input_ids": _tensor(sequences.input_ids[order], device)[None],
        "position_ids": _tensor(sequences.position_ids[order], device)[None],
        "attention_mask": torch.from_numpy(segments)[None, None],
    }
    cu_labels = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return Layout(
        inputs,
        rows=_tensor(np.concatenate(rows or [order]), device),
        labels=_tensor(np.concatenate(labels or [order]), device),
        cu_labels=_tensor(cu_labels, device),
        kind="packed",
        packing="segments",
    )


def _common_beginning(sequences: Sequences, one: slice, other: slice) -> int:
    """How many tokens, at the same positions, both begin with; 0 if too few to pay."""
    length = min(one.stop - one.start, other.stop - other.start)
    differ = np.zeros(length, dtype=bool)
    for array in (sequences.input_ids, sequences.position_ids):
        differ |= array[one.start : one.start + length] != array[other.start : other.start + length]
    common = int(differ.argmax()) if differ.any() else length
    return common if common >= SHORTEST_SHARED else 0


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
