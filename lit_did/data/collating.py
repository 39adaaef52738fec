"""From B examples to one batch of 2B right-padded sequences with shifted labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_did.data.dataset import Example

IGNORE_INDEX = -100


def collate_pairs(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Collates B pairs; the chosen sequences come first, then the rejected ones in the same order.

    Padding is on the right and known by length alone, so that `pad_token_id` may equal EOS. With causal attention the
    logits of a sequence then do not depend on the batch around it.

    Args:
        examples: B examples.
        pad_token_id: the id that fills `input_ids` where `attention_mask` is 0.

    Returns:
        input_ids: (2B, T) int64, T the longest prompt + completion of the batch.
        attention_mask: (2B, T) int64, 1 on tokens and 0 on padding.
        labels: (2B, T) int64, already shifted: `labels[i, t]` is the token that position t predicts, which is
            `input_ids[i, t + 1]`, where that is a completion token, else -100.
        index: (B,) int64, the rows' numbers in their source.
        weight: (B,) float32, 1, or 0 for a row that only fills a rank's last batch in distributed evaluation.
    """
    sequences = [(example.prompt_ids, example.chosen_ids) for example in examples]
    sequences += [(example.prompt_ids, example.rejected_ids) for example in examples]
    shape = (len(sequences), max(len(prompt) + len(completion) for prompt, completion in sequences))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :start] = torch.from_numpy(prompt)
        input_ids[row, start:end] = torch.from_numpy(completion)
        attention_mask[row, :end] = 1
        labels[row, start - 1 : end - 1] = input_ids[row, start:end]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "index": torch.tensor([example.index for example in examples], dtype=torch.int64),
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
    }
