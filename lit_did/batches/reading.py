"""Batches of other trainers: which tokens are completions, whatever a batch calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.checks import check_bounds


def read_batch(batch: Any, ignore_index: int = IGNORE_INDEX) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and shifted `labels` [sequences, T] of a batch of a causal language model.

    Args:
        batch: A mapping in one of these forms, tensors [sequences, T]:
            - `input_ids` and `labels`, as transformers wants them (`labels[:, t]` is `input_ids[:, t]`, or -100) or
              shifted, as lit_did does (`labels[:, t]` is `input_ids[:, t + 1]`, or -100). Where both readings fit,
              which takes a batch of repeated tokens, the first is meant;
            - `input_ids` and `completion_mask`, as TRL's DPOTrainer makes them, 1 on completion tokens;
            - both kinds of keys with `chosen_` and `rejected_` before them;
            - the first two with `cu_seqlens` [sequences + 1] and tensors [1, tokens]: sequences end to end. In place of
              `cu_seqlens`, transformers' `cu_seq_lens_q`, `seq_idx`, or `position_ids` that begin again, say where.
            `attention_mask` (without it, all tokens count) and `position_ids` are kept. `weight` [pairs] of 0, as
            `PreferenceDataModule` gives the pairs that only fill a batch, leaves a pair without labels.
        ignore_index: What stands for -100 in the batch's labels.

    Returns:
        A dict with `labels[:, t]` the completion token that position t predicts, or -100, padded on the right where the
        batch was not. Of the `chosen_` form, the chosen sequences come first, then the rejected ones.

    Raises:
        TypeError: The batch is no mapping of tensors.
        ValueError: It is in no such form, its labels are neither of both, or it holds images.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "completion_mask": torch.tensor([[0, 1, 1]])}
        >>> read_batch(batch)["labels"]
        tensor([[   6,    7, -100]])
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected the batch to be a mapping, but got {type(batch).__name__}: where completions are "
            "generated during training (GRPO, RLOO, online DPO), the batch holds none that could be measured."
        )
    if "chosen_input_ids" in batch and "rejected_input_ids" in batch:
        return _stack(*(_read(_without_prefix(batch, side), ignore_index) for side in ("chosen_", "rejected_")))
    return _read(batch, ignore_index)


def _read(batch: Mapping[str, Any], ignore_index: int) -> dict[str, Tensor]:
    if "input_ids" not in batch or not ("labels" in batch or "completion_mask" in batch):
        raise ValueError(
            "Expected the batch to hold `input_ids` and `labels` or `completion_mask`, perhaps with `chosen_` and "
            f"`rejected_` before them, but got {', '.join(map(str, batch)) or 'nothing'}."
        )
    if "pixel_values" in batch:
        raise ValueError("Expected a batch of text alone, but got one with `pixel_values`.")
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
        elif (labels[:, :-1] == input_ids[:, 1:])[labelled[:, :-1]].all():  # the last one follows the last input
            labels = torch.where(labelled, labels, IGNORE_INDEX)
        else:
            raise ValueError(
                f"Expected `labels` to be `input_ids` where they are not {ignore_index}, shifted by one position or "
                "not, but got others: give `logits_fn` where labels are something else."
            )
    if "weight" in batch:
        kept_rows = (batch["weight"] > 0).repeat(input_ids.shape[0] // batch["weight"].shape[0])
        labels = labels.masked_fill(~kept_rows[:, None], IGNORE_INDEX)
    kept = {"attention_mask": batch.get("attention_mask", torch.ones_like(input_ids))}
    if "position_ids" in batch:
        kept["position_ids"] = batch["position_ids"].expand_as(input_ids)
    return {"input_ids": input_ids, **kept, "labels": labels}


def _packed_bounds(batch: Mapping[str, Any]) -> Tensor | None:
    """`cu_seqlens` of sequences end to end, also where transformers' keys for them say where they begin, or None."""
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
            "Expected one sequence a row, or one row of sequences end to end, but got several rows of which one holds "
            "several sequences: its `position_ids` or `seq_idx` begin again within it."
        )
    ends = input_ids.new_tensor([0, input_ids.shape[1]])
    return torch.cat([ends[:1], begins[0].nonzero()[:, 0] + 1, ends[1:]])


def padded(batch: Mapping[str, Any], ignore_index: int = IGNORE_INDEX) -> dict[str, Any]:
    """A batch [1, tokens] of sequences end to end, with `cu_seqlens` [sequences + 1], as rows padded on the right.

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
    """labels[:, t] = input_ids[:, t + 1] where that counts, else -100; nothing follows the last token."""
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
