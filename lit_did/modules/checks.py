"""What LitDPO checks of its arguments, its models and the first batch it meets, once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_did.functional import REFERENCE_FREE_LOSSES
from lit_did.models.batches import IGNORE_INDEX, padded
from lit_did.models.loading import active_dropout


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the batch has a layout that LitDPO documents, its labels shifted."""
    packed = "cu_seqlens" in batch
    for name in ("input_ids", "labels") if packed else ("input_ids", "attention_mask", "labels"):
        if name not in batch:
            raise ValueError(f"Expected the batch to hold `{name}`, but got {', '.join(map(str, batch))}.")
        shape = tuple(batch["input_ids"].shape)
        rows_fit = shape[0] == 1 if packed else shape[0] % 2 == 0
        if tuple(batch[name].shape) != shape or len(shape) != 2 or not rows_fit or not all(shape):
            raise ValueError(
                f"Expected `{name}` to have the shape {'[1, tokens]' if packed else '[2 pairs, T]'} of `input_ids`, "
                f"{shape}, but got {tuple(batch[name].shape)}."
            )
    if packed:
        batch = padded(batch)
        if len(batch["input_ids"]) % 2:
            raise ValueError(
                f"Expected `cu_seqlens` to have [2 pairs + 1] entries, but got {1 + len(batch['input_ids'])}."
            )
    labels, input_ids = batch["labels"], batch["input_ids"]
    labelled = labels != IGNORE_INDEX
    if (labelled[:, :-1] & (labels[:, :-1] != input_ids[:, 1:])).any() or labelled[:, -1].any():
        raise ValueError(
            "Expected `labels[:, t]` to be the token that position t predicts, `input_ids[:, t + 1]`, or -100, but got "
            "labels that are not shifted: use labels = input_ids.roll(-1, 1) with -100 outside completions."
        )
    if not labelled.any(1).all():
        raise ValueError("Expected every sequence to have completion tokens, but got one whose labels are all -100.")


def check_step_options(
    pack: bool, share_prompts: bool, recompute_elementwise: bool, tokens_at_once: int | str | None
) -> None:
    """Raises TypeError or ValueError unless they are what LitDPO documents."""
    switches = {"pack": pack, "share_prompts": share_prompts, "recompute_elementwise": recompute_elementwise}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"Expected `{name}` to be a bool, but got {value!r}.")
    number = isinstance(tokens_at_once, int) and not isinstance(tokens_at_once, bool) and tokens_at_once > 0
    if not number and tokens_at_once is not None and tokens_at_once != "auto":
        raise ValueError(
            f"Expected `tokens_at_once` to be a positive integer, 'auto' or None, but got {tokens_at_once!r}."
        )


def check_models(
    policy: str | nn.Module, reference: str | nn.Module | None, loss: str, cache_reference: str | None
) -> None:
    """Raises TypeError or ValueError unless they can be a policy and its reference with that loss."""
    for name, model in (("policy", policy), ("reference", reference)):
        if not isinstance(model, str | nn.Module) and not (name == "reference" and model is None):
            raise TypeError(f"Expected `{name}` to be a model or its name, but got {type(model).__name__}.")
    if reference is policy and isinstance(policy, nn.Module):
        raise ValueError("Expected `reference` to be another module than `policy`: training would move both.")
    if loss not in REFERENCE_FREE_LOSSES:
        return
    named = reference if reference is None or isinstance(reference, str) else type(reference).__name__
    for name, value in (("cache_reference", cache_reference), ("reference", named)):
        if value is not None:
            raise ValueError(
                f"Expected `{name}` to be None with `loss={loss!r}`, which has no reference, but got {value}."
            )


def check_did_entropy_weight(weight: float, loss: str) -> None:
    """Raises TypeError or ValueError unless `did_entropy_weight` is a finite number that suits the loss."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"Expected `did_entropy_weight` to be a number, but got {weight!r}.")
    if not math.isfinite(weight):
        raise ValueError(f"Expected `did_entropy_weight` to be finite, but got {weight}.")
    if weight and loss in REFERENCE_FREE_LOSSES:
        raise ValueError(
            f"Expected `did_entropy_weight` to be 0 with `loss={loss!r}`, whose DID has no reference, but got {weight}."
        )


def check_token_ids(policy: nn.Module, input_ids: Tensor) -> None:
    """Raises ValueError if a token is beyond the policy's vocabulary: on a GPU the failure would name nothing."""
    embeddings = policy.get_input_embeddings() if hasattr(policy, "get_input_embeddings") else None
    size, largest = getattr(embeddings, "num_embeddings", None), int(input_ids.max())
    if size is not None and largest >= size:
        raise ValueError(
            f"Expected `input_ids` to be below the policy's {size} embeddings, but got {largest}: are they another "
            "model's tokenizer's?"
        )


def warn_unless_policy_is_reference(
    policy: nn.Module, adapter: bool, log_ratio: Tensor, num_tokens: Tensor, loss: Tensor, expected_loss: Tensor
) -> None:
    """Warns, with the cause, if the policy does not start as its reference.

    Args:
        policy: The policy, in the mode it is trained in.
        adapter: Whether the reference is the policy with its adapter off.
        log_ratio, num_tokens: [sequences] of the first batch.
        loss, expected_loss: Scalars: the first batch's, and the one where every log-ratio is 0.
    """
    parameter = next(policy.parameters())
    full = parameter.dtype == torch.float32 and not torch.is_autocast_enabled(parameter.device.type)
    # Rounding grows with length: a token's log-probability is good to 1e-5 in float32, to 1e-2 in half precision.
    tolerance = (1e-4 if full else 1e-2) * num_tokens
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
        f"At the first step the policy should be its reference, with loss {expected_loss:.4f} and every margin 0, but "
        f"the loss is {loss:.4f} and the largest |log-ratio| {largest:.4g} nats. Cause: {cause}.",
        stacklevel=3,
    )
