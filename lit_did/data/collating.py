"""From B examples to one batch of 2B sequences with shifted labels: right-padded, or laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_did.data.dataset import Example
from lit_did.data.tokenizing import Context

IGNORE_INDEX = -100


def collate_pairs(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Collates B pairs; the chosen sequences come first, then the rejected ones in the same order.

    Padding is on the right and known by length alone, so that `pad_token_id` may equal EOS. With causal attention the
    logits of a sequence then do not depend on the batch around it.

    Args:
        examples: B examples.
        pad_token_id: The id that fills `input_ids` where `attention_mask` is 0.

    Returns:
        input_ids: (2B, T) int64, T the longest prompt + completion of the batch.
        attention_mask: (2B, T) int64, 1 on tokens and 0 on padding.
        labels: (2B, T) int64, already shifted: `labels[i, t]` is the token that position t predicts, which is
            `input_ids[i, t + 1]`, where that is a completion token, else -100. Other turns within a completion of
            several turns (`Context`) are in `input_ids` and have no labels.
        index: (B,) int64, the rows' numbers in their source.
        weight: (B,) float32, 1, or 0 for a row that only fills a rank's last batch in distributed evaluation.
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
    """Collates B pairs without padding: their 2B sequences end to end, the chosen ones first, as in `collate_pairs`.

    Args:
        examples: B examples.

    Returns:
        input_ids: (1, tokens) int64.
        position_ids: (1, tokens) int64, from 0 in each sequence.
        labels: (1, tokens) int64, already shifted as in `collate_pairs`: a sequence's last position predicts nothing.
        cu_seqlens: (2B + 1,) int32; sequence i has the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
        index, weight: (B,), as in `collate_pairs`.

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
    """Of each sequence the prompt, what follows it, and the labels of that."""
    chosen = [(e.prompt_ids, *_with_context(e.chosen_ids, e.chosen_context)) for e in examples]
    return chosen + [(e.prompt_ids, *_with_context(e.rejected_ids, e.rejected_context)) for e in examples]


def _with_context(ids: np.ndarray, context: Context | None) -> tuple[np.ndarray, np.ndarray]:
    if context is None:
        return ids, ids
    return tuple(np.insert(ids, context.places, between) for between in (context.ids, IGNORE_INDEX))


def _rows(examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        "index": torch.tensor([example.index for example in examples], dtype=torch.int64),
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
    }
