"""One reading for the batches of every trainer: which tokens are completions, and what predicts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.checks import check_bounds


def read_batch(batch: Any, ignore_index: int = IGNORE_INDEX) -> dict[str, Tensor]:
    """Reads a batch of a causal language model in any of the forms that trainers use.

    Args:
        batch: A mapping in one of these forms, with tensors [sequences, T]:
            - `input_ids` and `labels`, as transformers wants them (`labels[:, t]` is `input_ids[:, t]` or -100), or
              shifted, as lit_did does (`labels[:, t]` is `input_ids[:, t + 1]` or -100). If both readings fit, the
              labels are read as transformers'. This takes a batch of repeated tokens.
            - `input_ids` and `completion_mask`, as TRL's DPOTrainer makes them. The mask is 1 on completion tokens.
            - Either of these with `chosen_` and `rejected_` before each key.
            - The first two with `cu_seqlens` [sequences + 1] and tensors [1, tokens]: sequences end to end. Instead of
              `cu_seqlens`, transformers' `cu_seq_lens_q`, `seq_idx` or restarting `position_ids` may mark them.
            `attention_mask` and `position_ids` are optional. Without `attention_mask`, every token counts. A `weight`
            [pairs] of 0 removes a pair's labels. `PreferenceDataModule` gives it to pairs that only fill a batch.
        ignore_index: The label of tokens that are not part of a completion.

    Returns:
        `input_ids`, `attention_mask` and `labels` [sequences, T], and `position_ids` if the batch has them.
        `labels[:, t]` is the completion token that position t predicts, or -100. Packed sequences are padded on the
        right. Of a batch with `chosen_` keys, the chosen sequences come first, then the rejected ones.

    Raises:
        TypeError: The batch is not a mapping, or one of these keys is not a tensor.
        ValueError: The batch has none of these forms, its labels fit neither reading, or it holds images.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "completion_mask": torch.tensor([[0, 1, 1]])}
        >>> read_batch(batch)["labels"]
        tensor([[   6,    7, -100]])
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected the batch to be a mapping, but got {type(batch).__name__}. Trainers that generate completions "
            "during training (GRPO, RLOO, online DPO) have none in their batches, so they cannot be measured."
        )
    if "chosen_input_ids" in batch and "rejected_input_ids" in batch:
        return _stack(*(_read(_without_prefix(batch, side), ignore_index) for side in ("chosen_", "rejected_")))
    return _read(batch, ignore_index)


def _read(batch: Mapping[str, Any], ignore_index: int) -> dict[str, Tensor]:
    if "input_ids" not in batch or not ("labels" in batch or "completion_mask" in batch):
        raise ValueError(
            "Expected the batch to hold `input_ids` and `labels` or `completion_mask`, each perhaps with `chosen_` and "
            f"`rejected_` before it, but got {', '.join(map(str, batch)) or 'nothing'}."
        )
    if "pixel_values" in batch:
        raise ValueError("Expected a batch of text only, but got one with `pixel_values`.")
    input_ids = batch["input_ids"]
    for name in ("input_ids", "labels", "completion_mask", "attention_mask"):
        if name in batch and not isinstance(batch[name], Tensor):
            raise TypeError(f"Expected `{name}` of the batch to be a tensor, but got {type(batch[name]).__name__}.")
        if name in batch and (batch[name].dim() != 2 or batch[name].shape != input_ids.shape):
            raise ValueError(
                f"Expected `{name}` to have the shape [sequences, T] of `input_ids`, {tuple(input_ids.shape)}, "
                f"but got {tuple(batch[name].shape)}."
            )
    bounds = _packed_bounds(batch)
    if bounds is not None:
        batch = padded({**batch, "cu_seqlens": bounds}, ignore_index)
        input_ids = batch["input_ids"]
    if "completion_mask" in batch:
        labels = _shift(input_ids, batch["completion_mask"].bool())
    else:
        labels = batch["labels"]
        labelled = labels != ignore_index
        if (labels == input_ids)[labelled].all():
            labels = _shift(input_ids, labelled)
        elif (labels[:, :-1] == input_ids[:, 1:])[labelled[:, :-1]].all():  # a last label may follow the last input
            labels = torch.where(labelled, labels, IGNORE_INDEX)
        else:
            raise ValueError(
                f"Expected `labels` to be {ignore_index} or the tokens of `input_ids`, shifted by one position or "
                "not, but got other values. Pass `logits_fn` if the labels are something else."
            )
    if "weight" in batch:
        kept_rows = (batch["weight"] > 0).repeat(input_ids.shape[0] // batch["weight"].shape[0])
        labels = labels.masked_fill(~kept_rows[:, None], IGNORE_INDEX)
    kept = {"attention_mask": batch.get("attention_mask", torch.ones_like(input_ids))}
    if "position_ids" in batch:
        kept["position_ids"] = batch["position_ids"].expand_as(input_ids)
    return {"input_ids": input_ids, **kept, "labels": labels}


def _packed_bounds(batch: Mapping[str, Any]) -> Tensor | None:
    """`cu_seqlens` [sequences + 1] if a row holds several sequences, marked in any of transformers' ways, else None."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if name in batch:
            return batch[name]
    input_ids, whole = batch["input_ids"], torch.ones_like(batch["input_ids"])
    both = (batch.get("attention_mask", whole)[:, 1:] * batch.get("attention_mask", whole)[:, :-1]).bool()
    begins = torch.zeros_like(both)
    if "position_ids" in batch:
        begins |= batch["position_ids"].expand_as(input_ids).diff(dim=1) != 1
    if "seq_idx" in batch:
        begins |= batch["seq_idx"].expand_as(input_ids).diff(dim=1) != 0
    begins &= both
    if not begins.any():
        return None
    if len(input_ids) > 1 or not both.all():
        raise ValueError(
            "Expected one sequence in each row, or a single row of sequences end to end, but got several rows, one of "
            "which holds several sequences: its `position_ids` or `seq_idx` restart within it."
        )
    ends = input_ids.new_tensor([0, input_ids.shape[1]])
    return torch.cat([ends[:1], begins[0].nonzero()[:, 0] + 1, ends[1:]])


def padded(batch: Mapping[str, Any], ignore_index: int = IGNORE_INDEX) -> dict[str, Any]:
    """Gives every sequence of a packed batch a row of its own, padded on the right.

    Args:
        batch: Tensors [1, tokens] of sequences end to end, and `cu_seqlens` [sequences + 1].
        ignore_index: The label of padding.

    Returns:
        The batch without `cu_seqlens`, its tensors [sequences, T], with an `attention_mask`.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to the number of tokens.
    """
    check_bounds(batch["cu_seqlens"], batch["input_ids"])
    lengths = batch["cu_seqlens"].diff().tolist()
    fills = {"input_ids": 0, "labels": ignore_index, "completion_mask": 0, "position_ids": 0, "attention_mask": 0}
    rows = {"attention_mask": torch.ones_like(batch["input_ids"])}
    rows |= {name: batch[name] for name in fills if name in batch}
    rows = {n: pad_sequence(v[0].split(lengths), batch_first=True, padding_value=fills[n]) for n, v in rows.items()}
    return {name: value for name, value in batch.items() if name != "cu_seqlens"} | rows


def _shift(input_ids: Tensor, counts: Tensor) -> Tensor:
    """labels[:, t] is input_ids[:, t + 1] where `counts` holds for that, else -100. Nothing follows the last token."""
    labels = torch.where(counts, input_ids, IGNORE_INDEX).roll(-1, 1)
    labels[:, -1:] = IGNORE_INDEX
    return labels


def _without_prefix(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in batch.items() if str(name).startswith(prefix)}


def _stack(chosen: dict[str, Tensor], rejected: dict[str, Tensor]) -> dict[str, Tensor]:
    length = max(side["input_ids"].shape[1] for side in (chosen, rejected))

    def padded(side: dict[str, Tensor], name: str) -> Tensor:
        fill = IGNORE_INDEX if name == "labels" else 0
        return torch.nn.functional.pad(side[name], (0, length - side[name].shape[1]), value=fill)

    return {name: torch.cat([padded(chosen, name), padded(rejected, name)]) for name in chosen if name in rejected}
