"""A model's arguments for the sequences of a batch: padded rows, or one row end to end with common beginnings once."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.moving import to_device
from lit_did.batches.sequences import Sequences

SHORTEST_SHARED = 8  # tokens: encoding fewer twice costs less than attending to a shared beginning

Kind = Literal["packed", "padded", "alone"]
Packing = Literal["segments", "positions"]


class Layout(NamedTuple):
    """A model's arguments, and the positions in them that predict completion tokens."""

    inputs: dict[str, Any]
    """The arguments: `input_ids` [rows, T] int64, `position_ids`, `attention_mask`."""
    rows: Tensor
    """[completion tokens] int64: for each token, the position in [rows * T] that predicts it, sequence by sequence.
    A position that several sequences share, such as the last one of a prompt, is listed once for each."""
    labels: Tensor
    """[completion tokens] int64: the completion tokens."""
    cu_labels: Tensor
    """[sequences + 1] int64: sequence i has the completion tokens from `cu_labels[i]` to `cu_labels[i + 1]`."""
    kind: Kind = "padded"
    """"packed": one row end to end. "padded": one row for each sequence. "alone": the same rows, but each is a forward
    pass of its own, without padding."""
    packing: Packing | None = None
    """How the model keeps the sequences of a packed row apart, see `lit_did.models.attention.packings`."""
    forgets: bool = False
    """Whether a forward pass over one token precedes each row, because the model keeps state between passes."""


def padded_layout(sequences: Sequences, device: torch.device) -> Layout:
    """One row for each sequence, padded on the right.

    Args:
        sequences: The sequences.
        device: Where the model is.
    """
    lengths = np.diff(sequences.cu_seqlens)
    shape = (sequences.num_sequences, int(lengths.max(initial=1)))
    present = np.arange(shape[1]) < lengths[:, None]  # row after row: the order of the tokens

    def padded(values: np.ndarray, fill: int) -> np.ndarray:
        result = np.full(shape, fill, dtype=np.int64)
        result[present] = values
        return result

    labels = padded(sequences.labels, IGNORE_INDEX)
    inputs = {
        # Padding may be any id of the vocabulary, because nothing attends to it.
        "input_ids": _tensor(padded(sequences.input_ids, int(sequences.input_ids[:1].sum())), device),
        "attention_mask": _tensor(present, device),
    }
    if not sequences.positions_count_from_zero:  # otherwise models count themselves
        inputs["position_ids"] = _tensor(padded(sequences.position_ids, 0), device)
    labelled = labels != IGNORE_INDEX
    return Layout(
        inputs,
        rows=_tensor(labelled.reshape(-1).nonzero()[0], device),
        labels=_tensor(labels[labelled], device),
        cu_labels=_tensor(np.concatenate([[0], labelled.sum(1).cumsum()]), device),
    )


def packed_layout(sequences: Sequences, device: torch.device, *, share: bool) -> Layout:
    """All sequences end to end in one row of segments, which `attention_mask` describes.

    A segment is a whole sequence, a beginning that a pair shares, or what follows such a beginning. `attention_mask` is
    [1, 1, segments, 2] int64 on the CPU: the length of each segment, and the number of the segment that it continues,
    or -1. `lit_did.models.attention` reads it.

    Args:
        sequences: The sequences. If `share`, the chosen ones first, then the rejected ones in the same order.
        device: Where the model is.
        share: Whether the beginning that the two sequences of a pair share (the prompt, perhaps more) is in the row
            only once. Both sequences continue it.
    """
    pieces: list[slice] = []  # the tokens of each segment
    continues: list[int] = []
    parts_of: list[list[int]] = [[] for _ in range(sequences.num_sequences)]  # the segments of each sequence

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
        of_tokens = sequences.labels[sequences.slice(sequence)]
        labelled = of_tokens != IGNORE_INDEX
        labels.append(of_tokens[labelled])
        rows.append(np.concatenate([places[part] for part in parts] or [order[:0]])[labelled])
    segments = np.stack([lengths, np.array(continues, dtype=np.int64)], axis=1)
    with unset_fake_temporarily():  # attention reads its values, also where all other tensors are fake
        mask = torch.from_numpy(segments[None, None])
    inputs = {
        "input_ids": _tensor(sequences.input_ids[order], device)[None],
        "position_ids": _tensor(sequences.position_ids[order], device)[None],
        "attention_mask": mask,
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
    """The number of tokens, at the same positions, that both sequences begin with. 0 if they are too few to share."""
    length = min(one.stop - one.start, other.stop - other.start)
    differ = np.zeros(length, dtype=bool)
    for array in (sequences.input_ids, sequences.position_ids):
        differ |= array[one.start : one.start + length] != array[other.start : other.start + length]
    common = int(differ.argmax()) if differ.any() else length
    return common if common >= SHORTEST_SHARED else 0


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)), device)
