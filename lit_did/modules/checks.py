"""What LitDPO checks: its arguments, its models and every batch."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_did.arguments import check_number
from lit_did.models.batches import IGNORE_INDEX, check_bounds
from lit_did.models.dropout import active_dropout, random_modules
from lit_did.models.forward import num_positions
from lit_did.models.layout import Sequences, read_sequences
from lit_did.ops import SequenceStatistics

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # all hold the -100 of labels


@torch.compiler.disable  # on the CPU, of other lengths in every batch: nothing to compile
def checked_sequences(policy: nn.Module, batch: Mapping[str, Tensor], *, weighted: bool = False) -> Sequences:
    """The sequences of a batch that has a layout which LitDPO documents, its labels shifted.

    Args:
        policy: Whose vocabulary the tokens must be of.
        weighted: Whether pairs of `weight` 0 do not count, and need no labels.

    Raises:
        TypeError, ValueError: It has not.
    """
    count = _check_form(batch)
    if weighted:
        check_of_pairs(batch, "weight", count // 2)
    names = ["input_ids", "labels", "cu_seqlens" if "cu_seqlens" in batch else "attention_mask", "position_ids"]
    batch = {name: batch[name].cpu() for name in [*names, *["weight"] * weighted] if name in batch}
    _check_labels(batch)
    sequences = read_sequences(batch)
    _check_counts(sequences, batch.get("weight"))
    _check_order(sequences)
    _check_token_ids(policy, sequences)
    _warn_of_positions(policy, sequences)
    return sequences


def check_of_pairs(batch: Mapping[str, Any], name: str, pairs: int) -> None:
    """Raises TypeError or ValueError unless the batch has nothing of that name, or a tensor [pairs]."""
    if name not in batch:
        return
    if not isinstance(batch[name], Tensor):
        raise TypeError(f"Expected `{name}` of the batch to be a tensor, but got {type(batch[name]).__name__}.")
    if tuple(batch[name].shape) != (pairs,):
        raise ValueError(
            f"Expected `{name}` to have the shape [pairs], {(pairs,)}, but got {tuple(batch[name].shape)}."
        )


def _check_form(batch: Mapping[str, Tensor]) -> int:
    """How many sequences there are.

    Raises:
        TypeError, ValueError: Something that LitDPO reads of every batch is not there, or does not fit.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"Expected the batch to be a dict of tensors, but got {type(batch).__name__}.")
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
            f"Expected `position_ids` to have the shape of `input_ids`, {shape}, or of a row, but got "
            f"{tuple(batch['position_ids'].shape)}."
        )
    if packed:
        check_bounds(batch["cu_seqlens"], batch["input_ids"])
    sequences = len(batch["cu_seqlens"]) - 1 if packed else shape[0]
    if sequences % 2:
        got = f"`cu_seqlens` with {sequences + 1} entries" if packed else f"`input_ids` of the shape {shape}"
        raise ValueError(
            "Expected an even number of sequences, the chosen ones and then as many rejected ones, but got "
            f"{sequences}: {got}."
        )
    return sequences


def _check_labels(batch: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless labels are the next tokens of their sequences."""
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
        got = "labels that are not shifted: use labels = input_ids.roll(-1, 1) with -100 outside completions"
    else:
        ends = position in last.remainder(labels.shape[1])
        next_token = "no token follows" if ends else f"{following[row, position]} follows"
        got = f"{labels[row, position]} where {next_token}, in row {row} at position {position}"
    raise ValueError(
        "Expected `labels[:, t]` to be the token that position t predicts, `input_ids[:, t + 1]`, or -100, but got "
        f"{got}."
    )


def _check_counts(sequences: Sequences, weight: Tensor | None) -> None:
    """Raises ValueError unless every sequence that counts has completion tokens."""
    before = np.concatenate([[0], (sequences.labels != IGNORE_INDEX).cumsum()])
    counts = np.diff(before[sequences.cu_seqlens])
    if weight is not None:
        counts = np.where((weight > 0).repeat(2).numpy(), counts, 1)  # bfloat16, which NumPy lacks, with bf16-true
    (empty,) = (counts == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"Expected every sequence to have completion tokens, but got {len(empty)} of "
            f"{sequences.num_sequences} whose labels are all -100 (or where `attention_mask` is 0). The first is "
            f"sequence {empty[0]}."
        )


def _check_order(sequences: Sequences) -> None:
    """Raises ValueError if chosen and rejected sequences lie in turn: prompts then tell which belong together."""
    pairs = sequences.num_sequences // 2
    if pairs < 2:
        return
    prompts = [_prompt(sequences, i) for i in range(sequences.num_sequences)]
    # One side's prompt may have been cut: it is then the end, or the beginning, of the other's.
    if all(_agree(prompts[i], prompts[i + pairs]) for i in range(pairs)):
        return
    if all(len(one) and np.array_equal(one, other) for one, other in zip(prompts[::2], prompts[1::2], strict=True)):
        raise ValueError(
            "Expected the chosen sequences first and then the rejected ones in the same order, but got them in turn: "
            f"rows 2k and 2k + 1 have the same prompt, and rows i and i + {pairs} do not. Put them in order with "
            "`torch.cat([rows[0::2], rows[1::2]])` for every tensor of the batch."
        )


def _prompt(sequences: Sequences, index: int) -> np.ndarray:
    own = sequences.slice(index)
    labelled = sequences.labels[own] != IGNORE_INDEX
    return sequences.input_ids[own][: labelled.argmax() + 1 if labelled.any() else len(labelled)]


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    shared = min(len(one), len(other))
    return np.array_equal(one[:shared], other[:shared]) or np.array_equal(
        one[len(one) - shared :], other[len(other) - shared :]
    )


def _check_token_ids(policy: nn.Module, sequences: Sequences) -> None:
    """Raises ValueError if a token is beyond the policy's vocabulary: on a GPU the failure would name nothing."""
    embeddings = policy.get_input_embeddings() if hasattr(policy, "get_input_embeddings") else None
    size = getattr(embeddings, "num_embeddings", None)
    # Labels too: the last one is no input. Padding is given to no model.
    ids = sequences.input_ids
    least, largest = ids.min(initial=0), max(ids.max(initial=0), sequences.labels.max(initial=0))
    if size is not None and largest >= size:
        raise ValueError(
            f"Expected `input_ids` to be below the policy's {size} embeddings, but got {largest}: was the data "
            "tokenised with another model's tokenizer?"
        )
    if least < 0:
        raise ValueError(f"Expected `input_ids` to be at least 0, but got {least}.")


def _warn_of_positions(policy: nn.Module, sequences: Sequences) -> None:
    """Warns of sequences that are longer than the policy knows positions; some models then fail, and name nothing."""
    limit = num_positions(policy)
    if sequences.position_ids.max(initial=0) >= limit:
        warnings.warn(
            f"Expected sequences of at most {limit} tokens, the policy's `max_position_embeddings`, but got longer "
            "ones: lower `max_length`.",
            stacklevel=5,
        )


def check_micro_batch_tokens(micro_batch_tokens: int | str | None) -> None:
    """Raises ValueError unless it is what LitDPO documents."""
    number = isinstance(micro_batch_tokens, int) and not isinstance(micro_batch_tokens, bool) and micro_batch_tokens > 0
    if not number and micro_batch_tokens is not None and micro_batch_tokens != "auto":
        raise ValueError(
            f"Expected `micro_batch_tokens` to be a positive integer, 'auto' or None, but got {micro_batch_tokens!r}."
        )


def check_training_step(objective: Tensor | None) -> None:
    """Raises RuntimeError if LitDPO's own training step, which keeps its `objective`, was left out."""
    if objective is None:
        raise RuntimeError(
            "Expected an overridden `training_step` to call `super().training_step(batch, batch_idx)`, which adds the "
            "batch to the metrics, but it was not called. Pass a function as `loss` to minimise another loss."
        )


def check_loading(lora: Any, model_kwargs: Mapping[str, Any] | None) -> None:
    """Raises TypeError unless they are what LitDPO documents."""
    # A PeftConfig, told without importing peft.
    if lora is not None and not isinstance(lora, Mapping) and not hasattr(lora, "peft_type"):
        raise TypeError(f"Expected `lora` to be a peft.LoraConfig, its arguments as a dict or None, but got {lora!r}.")
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"Expected `model_kwargs` to be a dict or None, but got {model_kwargs!r}.")


def cache_folder(cache_reference: Any) -> str | None:
    """`cache_reference` as text.

    Raises:
        TypeError: It is no path.
        ValueError: It is an empty one, which would be the working directory.
    """
    if cache_reference is None:
        return None
    if not isinstance(cache_reference, str | os.PathLike):
        raise TypeError(f"Expected `cache_reference` to be a folder's path or None, but got {cache_reference!r}.")
    if not str(cache_reference):
        raise ValueError("Expected `cache_reference` to be a folder's path, but got an empty one.")
    return os.fspath(cache_reference)


def check_models(
    policy: str | nn.Module,
    reference: str | nn.Module | None,
    cache_reference: str | None,
    reference_free: bool,
    loss: Any,
) -> None:
    """Raises TypeError or ValueError unless they can be a policy and its reference with that loss."""
    for name, model in (("policy", policy), ("reference", reference)):
        if not isinstance(model, str | nn.Module) and not (name == "reference" and model is None):
            raise TypeError(f"Expected `{name}` to be a model or its name, but got {type(model).__name__}.")
    if reference is policy and isinstance(policy, nn.Module):
        raise ValueError("Expected `reference` to be another module than `policy`: training would move both.")
    if not reference_free:
        return
    named = reference if reference is None or isinstance(reference, str) else type(reference).__name__
    for name, value in (("cache_reference", cache_reference), ("reference", named)):
        if value is not None:
            raise ValueError(
                f"Expected `{name}` to be None with `loss={loss!r}`, which has no reference, but got {value}."
            )


def check_token_did_entropy_weight(weight: float, reference_free: bool, loss: Any) -> None:
    """Raises TypeError or ValueError unless `token_did_entropy_weight` is a finite number that suits the loss."""
    check_number("token_did_entropy_weight", weight)
    if not math.isfinite(weight):
        raise ValueError(f"Expected `token_did_entropy_weight` to be finite, but got {weight}.")
    if weight and reference_free:
        raise ValueError(
            f"Expected `token_did_entropy_weight` to be 0 with `loss={loss!r}`, whose DID has no reference, but got "
            f"{weight}."
        )


def keep_noise_out(policy: nn.Module, sequences: Sequences) -> None:
    """Warns if the policy draws random numbers in training mode although dropout is switched off, and names where.

    The modules that draw them, such as routers that try experts at random, stay in eval mode where that helps.
    """
    input_ids = torch.from_numpy(sequences.input_ids)[None].to(next(policy.parameters()).device)
    noisy = random_modules(policy, input_ids)
    if not noisy:
        return
    modules = dict(policy.named_modules())
    named = f"{noisy[0] or 'the model'} ({type(modules[noisy[0]]).__name__})"
    training = [module for module in policy.modules() if module.training]
    silenced: list[str] = []
    while noisy and not set(noisy) & set(silenced):  # the innermost first, then what is around them
        for name in noisy:
            modules[name].eval()
        silenced += noisy
        noisy = random_modules(policy, input_ids)
    if not noisy:
        warnings.warn(
            f"{len(silenced)} modules of the policy draw random numbers in training mode, whatever its configuration "
            f"says. The first is {named}. With `disable_dropout=True` they stay in eval mode, so that the log-ratio "
            "does not compare draws of noise. Pass `disable_dropout=False` if you want the noise.",
            stacklevel=4,
        )
        return
    for module in training:
        module.training = True
    warnings.warn(
        f"With `disable_dropout=True`, {len(noisy)} modules of the policy still answer the same input differently "
        f"from one pass to the next in training mode. The first is {named}. The log-ratio then compares draws of "
        "noise too. Set that module's probability to 0, or pass `disable_dropout=False` if you want the noise.",
        stacklevel=4,
    )


def warn_unless_policy_is_reference(policy: nn.Module, adapter: bool, statistics: SequenceStatistics) -> None:
    """Warns, with the cause, if the policy does not start as its reference.

    Args:
        policy: The policy, in the mode it is trained in.
        adapter: Whether the reference is the policy with its adapter off.
        statistics: Of the first batch's sequences.
    """
    log_ratio = statistics.log_ratio.detach()
    parameter = next(policy.parameters())
    full = parameter.dtype == torch.float32 and not torch.is_autocast_enabled(parameter.device.type)
    # Rounding grows with length: a token's log-probability is good to 1e-5 in float32, to 1e-2 in half precision.
    tolerance = (1e-4 if full else 1e-2) * statistics.num_tokens
    largest = log_ratio.abs().max()
    if not ((log_ratio.abs() > tolerance).any() or largest.isnan()):
        return
    dropping = active_dropout(policy)
    if largest.isnan():
        cause = "the logits of the policy or the reference hold NaN"
    elif dropping:
        cause = f"dropout is active in {len(dropping)} modules of the policy, {dropping[0]} the first"
    elif adapter:
        cause = "the adapter does not start at zero: it was trained before, or its initialisation is not zero"
    else:
        cause = "the reference's weights are not those that the policy starts from, or its numerics differ"
    warnings.warn(
        "At the first step the policy should be its reference and every log-ratio 0, but the largest |log-ratio| is "
        f"{largest:.4g} nats. Cause: {cause}.",
        stacklevel=3,
    )
