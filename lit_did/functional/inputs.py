"""From what every metric accepts, logits and labels or statistics, to statistics of sequences and of pairs."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from lit_did.ops import SequenceStatistics, TokenStatistics, sequence_reduction, sequence_statistics
from lit_did.ops.extension import Backend

Statistics = Tensor | TokenStatistics | SequenceStatistics
"""what metrics take as their first argument: logits, or statistics in their place"""


class Options(TypedDict):
    """Options of `as_sequences` that a metric keeps."""

    ignore_index: int
    temperature: float
    backend: Backend


def as_sequences(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> SequenceStatistics:
    """Converts logits, TokenStatistics or SequenceStatistics to SequenceStatistics [sequences].

    Args:
        policy_logits: One of

            - logits [..., T, V] (or packed, [tokens, V], with `cu_seqlens`), with `reference_logits` and `labels`;
            - `TokenStatistics` [..., T] (or [tokens] with `cu_seqlens`), with the `labels` that they were made with,
              because their zeros do not show which tokens were ignored;
            - `SequenceStatistics` [...], alone.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T] (or [tokens]) integers: the token that each position predicts. None with `SequenceStatistics`.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        SequenceStatistics: tensors [sequences], with leading dimensions flattened, differentiable in the logits or
        statistics.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing, or is given where it must be None.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> as_sequences(logits, torch.zeros(1, 2, 2), torch.tensor([[1, -100]])).num_tokens
        tensor([1])
    """
    given = {"reference_logits": reference_logits, "labels": labels, "cu_seqlens": cu_seqlens}
    if isinstance(policy_logits, SequenceStatistics):
        _refuse("SequenceStatistics", given)
        return _flatten(policy_logits)
    if isinstance(policy_logits, TokenStatistics):
        _refuse("TokenStatistics", {"reference_logits": reference_logits})
        if labels is None:
            raise ValueError(
                "Expected `labels` with TokenStatistics, which do not show the tokens that were ignored, but got None."
            )
        return _flatten(
            sequence_reduction(policy_logits, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index, backend=backend)
        )
    if not isinstance(policy_logits, Tensor):
        raise TypeError(
            "Expected `policy_logits` to be a tensor, TokenStatistics or SequenceStatistics, "
            f"but got {type(policy_logits).__name__}."
        )
    if reference_logits is None or labels is None:
        missing = "reference_logits" if reference_logits is None else "labels"
        raise ValueError(f"Expected `{missing}` with logits, but got None.")
    return _flatten(
        sequence_statistics(
            policy_logits,
            reference_logits,
            labels,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
            temperature=temperature,
            backend=backend,
        )
    )


class Pairs(NamedTuple):
    """What preference metrics need of the pairs that count, those whose two completions both have tokens."""

    chosen_log_ratio: Tensor
    """[pairs] float64, in nats, summed over the completion; 0 where the pair does not count"""
    rejected_log_ratio: Tensor
    """[pairs] the same of the rejected completion"""
    counts: Tensor
    """[pairs] bool: whether the pair counts"""


def as_pairs(statistics: SequenceStatistics) -> Pairs:
    """The pairs in statistics [2 pairs] of sequences: the chosen first, then the rejected in the same order.

    Raises:
        ValueError: The number of sequences is odd.
    """
    sequences = statistics.num_tokens.shape[0]
    if sequences % 2:
        raise ValueError(
            "Expected an even number of sequences, the chosen completions first and then the rejected ones in the same "
            f"order, but got {sequences}."
        )
    chosen_counts, rejected_counts = (statistics.num_tokens > 0).chunk(2)
    counts = chosen_counts & rejected_counts
    chosen, rejected = (torch.where(counts, side.double(), 0) for side in statistics.log_ratio.chunk(2))
    return Pairs(chosen, rejected, counts)


def _flatten(statistics: SequenceStatistics) -> SequenceStatistics:
    shape = statistics.num_tokens.shape
    for name, value in zip(statistics._fields, statistics, strict=True):
        if value.shape != shape:
            raise ValueError(
                f"Expected `{name}` to have the shape of `num_tokens`, {tuple(shape)}, but got {tuple(value.shape)}."
            )
    if len(shape) == 1:
        return statistics
    return SequenceStatistics(*(value.reshape(-1) for value in statistics))


def _refuse(what: str, given: dict[str, Tensor | None]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"Expected `{name}` to be None with {what}, but got {type(value).__name__}.")
