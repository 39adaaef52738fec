"""Checks of the batches that LitDPO trains on: wrong labels, masks or orders would train on other tokens, silently."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.order import check_order
from lit_did.batches.sequences import Sequences, read_sequences

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # all hold the -100 of labels


@torch.compiler.disable  # NumPy on the CPU, of other lengths in every batch: nothing to compile
def checked_sequences(
    batch: Mapping[str, Tensor],
    *,
    num_embeddings: int | None = None,
    num_positions: float = float("inf"),
    weighted: bool = False,
) -> Sequences:
    """The sequences of a batch in one of the two forms that `LitDPO` documents.

    Args:
        batch: The batch. Its labels are shifted: `labels[:, t]` is the token that position t predicts.
        num_embeddings: The size of the model's embeddings, which every token id must be below. None: unknown.
        num_positions: The number of positions that the model knows. Longer sequences cause a warning.
        weighted: Whether pairs of `weight` 0 need no labels.

    Raises:
        TypeError, ValueError: The batch has another form.
    """
    count = _check_form(batch)
    if weighted:
        check_pair_values(batch, "weight", count // 2)
    names = ["input_ids", "labels", "cu_seqlens" if "cu_seqlens" in batch else "attention_mask", "position_ids"]
    batch = {name: batch[name].cpu() for name in [*names, *["weight"] * weighted] if name in batch}
    _check_labels(batch)
    sequences = read_sequences(batch)
    _check_counts(sequences, batch.get("weight"))
    check_order(sequences)
    _check_token_ids(sequences, num_embeddings)
    _warn_of_positions(sequences, num_positions)
    return sequences


def check_pair_values(batch: Mapping[str, Any], name: str, pairs: int) -> None:
    """Raises TypeError or ValueError if the batch has `name`, but not as a tensor [pairs]."""
    if name not in batch:
        return
    if not isinstance(batch[name], Tensor):
        raise TypeError(f"Expected `{name}` of the batch to be a tensor, but got {type(batch[name]).__name__}.")
    if tuple(batch[name].shape) != (pairs,):
        raise ValueError(
            f"Expected `{name}` to have the shape [pairs], {(pairs,)}, but got {tuple(batch[name].shape)}."
        )


def _check_form(batch: Mapping[str, Tensor]) -> int:
    """The number of sequences.

    Raises:
        TypeError, ValueError: A tensor is missing, or has a wrong type, dtype or shape.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"Expected the batch to be a mapping of tensors, but got {type(batch).__name__}.")
    packed = "cu_seqlens" in batch
    alike = ("input_ids", "labels") if packed else ("input_ids", "labels", "attention_mask")
    for name in alike:
        if name not in batch:
            got = ", ".join(map(str, batch)) or "nothing"
            raise ValueError(f"Expected the batch to hold `{name}`, but got {got}.")
    for name in (*alike, "position_ids", "cu_seqlens"):
        if name in batch and not isinstance(batch[name], Tensor):
            raise TypeError(f"Expected `{name}` of the batch to be a tensor, but got {type(batch[name]).__name__}.")
        if name in batch and name != "attention_mask" and batch[name].dtype not in _INTEGERS:
            raise TypeError(f"Expected `{name}` of the batch to hold signed integers, but got {batch[name].dtype}.")
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or not all(shape) or (packed and shape[0] != 1):
        form = "[1, tokens] with `cu_seqlens`" if packed else "[2 pairs, T]"
        raise ValueError(f"Expected `input_ids` to have the shape {form}, but got {shape}.")
    for name in alike:
        if tuple(batch[name].shape) != shape:
            raise ValueError(
                f"Expected `{name}` to have the shape of `input_ids`, {shape}, but got {tuple(batch[name].shape)}."
            )
    if "position_ids" in batch and tuple(batch["position_ids"].shape) not in (shape, (1, shape[1]), shape[1:]):
        raise ValueError(
            f"Expected `position_ids` to have the shape of `input_ids`, {shape}, or of one row, but got "
            f"{tuple(batch['position_ids'].shape)}."
        )
    if packed:
        check_bounds(batch["cu_seqlens"], batch["input_ids"])
    sequences = len(batch["cu_seqlens"]) - 1 if packed else shape[0]
    if sequences % 2:
        got = f"`cu_seqlens` with {sequences + 1} entries" if packed else f"`input_ids` of the shape {shape}"
        raise ValueError(
            "Expected an even number of sequences, the chosen ones first and then as many rejected ones, but got "
            f"{sequences}: {got}."
        )
    return sequences


def _check_labels(batch: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless every label is the next token of its sequence."""
    labels, input_ids = batch["labels"], batch["input_ids"]
    labelled = labels != IGNORE_INDEX
    if "cu_seqlens" in batch:
        last = batch["cu_seqlens"][1:].long() - 1
    else:
        labelled &= batch["attention_mask"] != 0
        last = torch.tensor([-1])
    following = input_ids.roll(-1, 1)
    wrong = labelled & (labels != following)
    wrong[:, last] |= labelled[:, last]
    if not wrong.any():
        return
    row, position = wrong.nonzero()[0].tolist()
    if (labels == input_ids)[labelled].all():
        got = "labels that are not shifted. Use input_ids.roll(-1, 1), with -100 outside completions, as labels"
    else:
        ends = position in last.remainder(labels.shape[1])
        next_token = "no token follows" if ends else f"{following[row, position]} follows"
        got = f"{labels[row, position]} where {next_token}, in row {row} at position {position}"
    raise ValueError(
        "Expected `labels[:, t]` to be the token that position t predicts, `input_ids[:, t + 1]`, or -100, but got "
        f"{got}."
    )


def _check_counts(sequences: Sequences, weight: Tensor | None) -> None:
    """Raises ValueError unless every sequence of a pair with a `weight` above 0 has completion tokens."""
    before = np.concatenate([[0], (sequences.labels != IGNORE_INDEX).cumsum()])
    counts = np.diff(before[sequences.cu_seqlens])
    if weight is not None:
        counts = np.where((weight > 0).repeat(2).numpy(), counts, 1)  # bfloat16, which NumPy lacks, with bf16-true
    (empty,) = (counts == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"Expected every sequence to have completion tokens, but {len(empty)} of {sequences.num_sequences} "
            "sequences have none: all their labels are -100, or `attention_mask` is 0 there. The first is sequence "
            f"{empty[0]}."
        )


def check_bounds(cu_seqlens: Tensor, input_ids: Tensor) -> None:
    """Raises ValueError unless `cu_seqlens` rises from 0 to the number of tokens of `input_ids` [1, tokens]."""
    bounds = cu_seqlens.tolist()
    whole = cu_seqlens.dim() == 1 and len(bounds) > 1 and (bounds[0], bounds[-1]) == (0, input_ids.shape[1])
    if not whole or len(input_ids) != 1 or any(start >= stop for start, stop in pairwise(bounds)):
        raise ValueError(
            "Expected `cu_seqlens` to rise from 0 to the number of tokens of `input_ids` [1, tokens], "
            f"{tuple(input_ids.shape)}, but got {bounds}."
        )


def _check_token_ids(sequences: Sequences, num_embeddings: int | None) -> None:
    """Raises ValueError if a token is not in the model's vocabulary: on a GPU the failure would not name the cause."""
    # Labels too: the last one is no input. No model gets the padding.
    ids = sequences.input_ids
    least, largest = ids.min(initial=0), max(ids.max(initial=0), sequences.labels.max(initial=0))
    if num_embeddings is not None and largest >= num_embeddings:
        raise ValueError(
            f"Expected `input_ids` to be below the policy's {num_embeddings} embeddings, but got {largest}. "
            "Tokenise the data with the policy's own tokenizer."
        )
    if least < 0:
        raise ValueError(f"Expected `input_ids` to be at least 0, but got {least}.")


def _warn_of_positions(sequences: Sequences, num_positions: float) -> None:
    """Warns of sequences that are longer than the model knows positions: some models then fail without a cause."""
    if sequences.position_ids.max(initial=0) >= num_positions:
        warnings.warn(
            f"The batch has sequences of more than {num_positions} tokens, the policy's `max_position_embeddings`. The "
            "policy was not made for longer ones: it may raise an error, or its probabilities may be poor. Lower "
            f"`max_length` to {num_positions}.",
            stacklevel=5,
        )
