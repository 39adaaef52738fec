"""Means over tokens of what the token statistics say about information: DID entropy and concentration, KL and others.

Each function has a metric of the same name in `lit_did.metrics.information`, which adds up what `token_sums` returns.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_did.arguments import check_choice
from lit_did.functional.inputs import Statistics, as_sequences
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend

Unit = Literal["nats", "bits"]


def token_did_entropy(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: Unit = "nats",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of the entropy of the token DID, q = softmax(policy_logits - reference_logits).

    It is in [0, log V], and log V where the policy is its reference. It is an average of the entropies of single
    tokens' DIDs, not the entropy of the DID of whole completions: that is `lit_did.functional.estimate_did_entropy`.

    Args:
        policy_logits: Logits [..., T, V], or [tokens, V] with `cu_seqlens`. `TokenStatistics` or `SequenceStatistics`
            can take their place.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        unit: "nats" or "bits".
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, differentiable in the logits or statistics. NaN without labelled tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> token_did_entropy(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), unit="bits")
        tensor(2.0000, dtype=torch.float64)
    """
    check_unit(unit)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return _mean_over_tokens(statistics, "token_did_entropy", unit)


def token_did_concentration(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: Unit = "nats",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of log V less the entropy of the token DID: how far the policy has moved from its reference.

    It is in [0, log V], and 0 where the policy is its reference. V counts the support: vocabulary entries that are -inf
    in both models do not count. It is an average over tokens, not the concentration of the DID of whole completions.

    Args:
        policy_logits: Logits [..., T, V], or [tokens, V] with `cu_seqlens`. `TokenStatistics` or `SequenceStatistics`
            can take their place.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        unit: "nats" or "bits".
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, differentiable in the logits or statistics. NaN without labelled tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0, 2.0, 0.0]]])
        >>> token_did_concentration(logits, torch.zeros(1, 1, 4), torch.tensor([[1]]), unit="bits")
        tensor(0.6752, dtype=torch.float64)
    """
    check_unit(unit)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return _mean_over_tokens(statistics, "token_did_concentration", unit)


def token_did_log_partition(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: Unit = "nats",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of log Z, where Z = sum_v pi_v / rho_v.

    A token gains weight in the DID if its log-ratio exceeds log Z less log V. log Z is at least 0 and has no upper
    bound. It is log V where the policy is its reference.

    Args:
        policy_logits: Logits [..., T, V], or [tokens, V] with `cu_seqlens`. `TokenStatistics` or `SequenceStatistics`
            can take their place.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        unit: "nats" or "bits".
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, differentiable in the logits or statistics. NaN without labelled tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> token_did_log_partition(logits, logits, torch.tensor([[1, 2, -100]]), unit="bits")
        tensor(2.0000, dtype=torch.float64)
    """
    check_unit(unit)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return _mean_over_tokens(statistics, "token_did_log_partition", unit)


def policy_entropy(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: Unit = "nats",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of the policy's entropy over the next token, in [0, log V].

    Args:
        policy_logits: Logits [..., T, V], or [tokens, V] with `cu_seqlens`. `TokenStatistics` or `SequenceStatistics`
            can take their place.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        unit: "nats" or "bits".
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, differentiable in the logits or statistics. NaN without labelled tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy_entropy(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), unit="bits")
        tensor(2.0000, dtype=torch.float64)
    """
    check_unit(unit)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return _mean_over_tokens(statistics, "policy_entropy", unit)


def policy_kl(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    reverse: bool = False,
    unit: Unit = "nats",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of KL(pi, rho) over the next token, pi being the policy and rho the reference. At least 0.

    It is exact: a sum over the vocabulary at the data's prefixes. It is neither the divergence of whole completions nor
    an estimate from samples.

    Args:
        policy_logits: Logits [..., T, V], or [tokens, V] with `cu_seqlens`. `TokenStatistics` or `SequenceStatistics`
            can take their place.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        reverse: KL(rho, pi) instead of KL(pi, rho).
        unit: "nats" or "bits".
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, differentiable in the logits or statistics. NaN without labelled tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy_kl(torch.tensor([[[0.0, 2.0]]]), torch.zeros(1, 1, 2), torch.tensor([[1]]))
        tensor(0.3278, dtype=torch.float64)
    """
    check_unit(unit)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return _mean_over_tokens(statistics, "reverse_kl" if reverse else "kl", unit)


def token_sums(statistics: SequenceStatistics, quantity: str) -> tuple[Tensor, Tensor]:
    """The sum of a field of the statistics over all tokens, float64, and the number of tokens, int64."""
    values = token_values(statistics, quantity)
    # Not a product with the mask: a sequence that does not count may hold NaN.
    return torch.where(statistics.num_tokens > 0, values, 0).sum(), statistics.num_tokens.sum()


def token_values(statistics: SequenceStatistics, quantity: str) -> Tensor:
    """[sequences] float64: the sum of a field of the statistics over the tokens of each sequence."""
    values = getattr(statistics, quantity).double()
    # All others are means over a sequence's tokens.
    return values if quantity == "token_did_log_partition" else values * statistics.num_tokens


def in_unit(value: Tensor, unit: Unit) -> Tensor:
    """`value`, given in nats, in `unit`."""
    return value / math.log(2) if unit == "bits" else value


def check_unit(unit: Unit) -> None:
    """Raises TypeError or ValueError unless `unit` is "nats" or "bits"."""
    check_choice("unit", unit, Unit)


def _mean_over_tokens(statistics: SequenceStatistics, quantity: str, unit: Unit) -> Tensor:
    total, tokens = token_sums(statistics, quantity)
    return in_unit(total / tokens, unit)
