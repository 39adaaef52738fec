"""Collates pairs into one batch of sequences with shifted labels: padded on the right, or laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_did.data.dataset import ContextArrays, Example

IGNORE_INDEX = -100


def collate_pairs(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Collates pairs with padding. The chosen sequences come first, then the rejected ones in the same order.

    Padding is on the right, and the lengths alone say where it is, so `pad_token_id` may equal EOS. With causal
    attention, the logits of a sequence do not depend on the other sequences of the batch.

    Args:
        examples: The pairs.
        pad_token_id: The id that fills `input_ids` where `attention_mask` is 0.

    Returns:
        A batch with these tensors, where T is the length of the longest prompt with its completion:

        - `input_ids`: [2 * pairs, T] int64.
        - `attention_mask`: [2 * pairs, T] int64, 1 on tokens and 0 on padding.
        - `labels`: [2 * pairs, T] int64, already shifted. `labels[i, t]` is the token that position t predicts,
          `input_ids[i, t + 1]`, if that is a completion token, and -100 otherwise. Other turns within a completion of
          several turns are in `input_ids` and have no labels.
        - `index`: [pairs] int64, row numbers in the source.
        - `weight`: [pairs] float32, 1, or 0 for a row that only fills a rank's last batch in distributed evaluation.
    """
    sequences = _sequences(examples)
    shape = (len(sequences), max(len(prompt) + len(completion) for prompt, completion, _ in sequences))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, (prompt, completion, scored) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :start] = torch.from_numpy(prompt)
        input_ids[row, start:end] = torch.from_numpy(completion)
        attention_mask[row, :end] = 1
        labels[row, start - 1 : end - 1] = torch.from_numpy(scored)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **_rows(examples)}


def collate_packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Collates pairs without padding: all sequences end to end, the chosen ones first, then the rejected ones.

    Args:
        examples: The pairs.

    Returns:
        A batch with these tensors:

        - `input_ids`: [1, tokens] int64.
        - `position_ids`: [1, tokens] int64, from 0 in each sequence.
        - `labels`: [1, tokens] int64, already shifted. `labels[0, t]` is the token that position t predicts if that is
          a completion token, and -100 otherwise. The last position of a sequence predicts nothing.
        - `cu_seqlens`: [2 * pairs + 1] int32. Sequence i has the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
        - `index`: [pairs] int64, row numbers in the source.
        - `weight`: [pairs] float32, 1, or 0 for a row that only fills a rank's last batch in distributed evaluation.

    Example:
        >>> import numpy as np
        >>> from lit_did.data.dataset import Example
        >>> ids = [np.array(ids) for ids in ([5, 6], [7, 8], [9])]
        >>> batch = collate_packed([Example(*ids, index=0, weight=1.0)])
        >>> batch["input_ids"].tolist(), batch["cu_seqlens"].tolist()
        ([[5, 6, 7, 8, 5, 6, 9]], [0, 4, 7])
        >>> batch["labels"].tolist()
        [[-100, 7, 8, -100, -100, 9, -100]]
    """
    sequences = _sequences(examples)
    ends = np.cumsum([0, *(len(prompt) + len(completion) for prompt, completion, _ in sequences)])
    input_ids = torch.from_numpy(np.concatenate([ids for sequence in sequences for ids in sequence[:2]])).long()
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for (_, _, scored), end in zip(sequences, ends[1:], strict=True):
        labels[end - len(scored) - 1 : end - 1] = torch.from_numpy(scored)
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], np.diff(ends))
    return {
        "input_ids": input_ids[None],
        "position_ids": torch.from_numpy(positions)[None],
        "labels": labels[None],
        "cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
        **_rows(examples),
    }


def _sequences(examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The prompt of each sequence, the tokens that follow it, and the labels of these."""
    chosen = [(e.prompt_ids, *_with_context(e.chosen_ids, e.chosen_context)) for e in examples]
    return chosen + [(e.prompt_ids, *_with_context(e.rejected_ids, e.rejected_context)) for e in examples]


def _with_context(ids: np.ndarray, context: ContextArrays | None) -> tuple[np.ndarray, np.ndarray]:
    if context is None:
        return ids, ids
    return np.insert(ids, context.places, context.ids), np.insert(ids, context.places, IGNORE_INDEX)


def _rows(examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        "index": torch.tensor([example.index for example in examples], dtype=torch.int64),
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
    }
