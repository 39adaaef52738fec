"""Sequences as plain lists of tokens, and the batches that hold them."""

from __future__ import annotations

import numpy as np
import torch

from lit_did.batches.layout import SHORTEST_SHARED

PROMPT = list(range(20, 20 + SHORTEST_SHARED))
PAIRS = [  # (prompt, chosen, rejected)
    (PROMPT, [1, 2, 3], [4, 5]),
    (PROMPT, [1, 2, 3, 4], [1, 2, 9, 9, 9]),  # in common: more than the prompt
    (PROMPT, [6, 7, 8], [6, 7, 8]),  # identical
    (PROMPT, [6, 7], [6, 7, 8, 9]),  # one is the beginning of the other
    ([20, 21], [1, 2], [3]),  # too little in common
    (PROMPT, [1], [2]),  # nothing but the prompt in common, and nothing after it but labels
]


def examples() -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every sequence, the chosen ones first; the last pair has no beginning in common."""
    chosen = [(p, c) for p, c, _ in PAIRS] + [([*PROMPT[:3], 50, *PROMPT[4:]], [5, 6])]
    rejected = [(p, r) for p, _, r in PAIRS] + [(PROMPT[::-1], [5, 6, 7])]
    return chosen + rejected


def expected(examples) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of every sequence: a completion's last token is no input."""
    return [((p + c)[:-1], [-100] * (len(p) - 1) + c) for p, c in examples]


def padded_batch(examples, side: str = "right") -> dict[str, torch.Tensor]:
    """Longer by two than the longest, with a tail that nothing is asked of after every completion."""
    tail = [60, 61]
    length = max(len(p) + len(c) for p, c in examples) + len(tail) + 2
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: torch.full((len(examples), length), -100 if name == "labels" else 0) for name in names}
    for row, (prompt, completion) in enumerate(examples):
        ids = prompt + completion + tail
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][row, place] = torch.tensor(ids)
        batch["attention_mask"][row, place] = 1
        first = place.start + len(prompt) - 1
        batch["labels"][row, first : first + len(completion)] = torch.tensor(completion)
    return batch


def packed_batch(examples) -> dict[str, torch.Tensor]:
    lengths = [len(p) + len(c) for p, c in examples]
    return {
        "input_ids": torch.tensor([[token for p, c in examples for token in p + c]]),
        "labels": torch.tensor([[x for p, c in examples for x in [-100] * (len(p) - 1) + c + [-100]]]),
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    }


def unpacked(sequences) -> list[tuple[list[int], list[int], list[int]]]:
    return [
        tuple(array[sequences.slice(i)].tolist() for array in (sequences.input_ids, sequences.labels))
        for i in range(sequences.num_sequences)
    ]
