"""The order of pairs in a batch: all chosen sequences, then the rejected ones. The prompts show any other order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.sequences import Sequences


def check_pairs(batch: Mapping[str, Any], sequences: Sequences) -> None:
    """Checks that another trainer's batch holds pairs: the chosen sequences, then the rejected ones in the same order.

    Prompts that were cut at either end, or that differ in their last token, count as the same.

    Args:
        batch: The trainer's batch.
        sequences: The batch's sequences.

    Raises:
        ValueError: The batch has a `label` for each sequence or an odd number of sequences. Or chosen and rejected
            sequences are in turn. Or no chosen sequence has the prompt of its rejected one.
    """
    remedy = "Pass `pairs=False` if the sequences are not pairs: the metrics of pairs are then left out."
    expected = "Expected a batch of pairs, the chosen sequences first and then the rejected ones in the same order"
    if "label" in batch:
        raise ValueError(f"{expected}, but got a batch with a `label` for each sequence. {remedy}")
    if sequences.num_sequences % 2:
        raise ValueError(
            "Expected an even number of sequences, the chosen ones first and then as many rejected ones, but got "
            f"{sequences.num_sequences}. {remedy}"
        )
    prompts = _prompts(sequences)
    pairs = len(prompts) // 2
    alike = list(map(_alike_but_for_last, prompts[:pairs], prompts[pairs:]))
    if all(alike):
        return
    check_order(sequences)
    if not any(alike):
        raise ValueError(
            f"{expected}, but no sequence of the first half has the prompt of its partner in the second half. {remedy}"
        )


def check_order(sequences: Sequences) -> None:
    """Raises ValueError if the chosen and the rejected sequences of the pairs are in turn."""
    prompts = _prompts(sequences)
    pairs = len(prompts) // 2
    if pairs < 2 or all(map(_alike, prompts[:pairs], prompts[pairs:])):
        return
    if all(len(one) and np.array_equal(one, other) for one, other in zip(prompts[::2], prompts[1::2], strict=True)):
        raise ValueError(
            "Expected the chosen sequences first and then the rejected ones in the same order, but got them in turn: "
            f"sequences 2k and 2k + 1 have the same prompt, and sequences k and k + {pairs} do not. Reorder every "
            "tensor of the batch with `torch.cat([rows[0::2], rows[1::2]])`."
        )


def _prompts(sequences: Sequences) -> list[np.ndarray]:
    """The tokens of each sequence before its first completion token."""

    def prompt(index: int) -> np.ndarray:
        own = sequences.slice(index)
        labelled = sequences.labels[own] != IGNORE_INDEX
        return sequences.input_ids[own][: labelled.argmax() + 1 if labelled.any() else len(labelled)]

    return [prompt(index) for index in range(sequences.num_sequences)]


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the prompts of a pair are the same. One of them may have been cut: it is then an end of the other."""
    shared = min(len(one), len(other))
    return np.array_equal(one[:shared], other[:shared]) or np.array_equal(
        one[len(one) - shared :], other[len(other) - shared :]
    )


def _alike_but_for_last(one: np.ndarray, other: np.ndarray) -> bool:
    """The same for tokenizers that merge the end of a prompt with the beginning of its completion."""
    shared = min(len(one), len(other))
    return _alike(one, other) or np.array_equal(one[: shared - 1], other[: shared - 1])
