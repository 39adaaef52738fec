"""sequence_statistics: the token statistics of every sequence, summed or averaged over its labelled tokens.

sequence_reduction does the same from token statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_did.ops.checks import check_cu_seqlens, check_token_arguments, check_tokens
from lit_did.ops.extension import EXTENSION, Backend, choose_backend
from lit_did.ops.statistics import SequenceStatistics, TokenStatistics
from lit_did.ops.token_statistics import token_statistics

if EXTENSION.module is not None:
    from lit_did.ops import fused


def sequence_statistics(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
    inplace_backward: bool = False,
) -> SequenceStatistics:
    """Log-ratio rewards, DID statistics, entropies and divergences of every sequence.

    Args:
        policy_logits: [..., T, V], or [tokens, V] with `cu_seqlens`. float32, bfloat16, float16 or float64.
        reference_logits: The same shape; its dtype may differ.
        labels: [..., T], or [tokens], integers: the token that each position's logits predict.
        cu_seqlens: [sequences + 1] int32 or int64: sequence i holds tokens cu_seqlens[i] to cu_seqlens[i + 1]. Without
            it the last dimension of `labels` is one sequence.
        ignore_index: Tokens with this label are not read and do not count.
        temperature: Both logits are divided by it.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        inplace_backward: The backward writes each gradient over its logits. `token_statistics` describes the
            consequences.

    Returns:
        SequenceStatistics: tensors [...] (or [sequences]) of sums and means over labelled tokens, in nats.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values do not fit, `cu_seqlens` does not rise from 0 to the number of tokens
            (checked on the CPU), or `labels` has no dimension to sum over. `inplace_backward=True` is refused where
            `token_statistics` refuses it.
        RuntimeError: `backend="fused"` does not support the device, or a transform.

    Example:
        >>> import torch
        >>> from lit_did import sequence_statistics
        >>> policy, reference = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]), torch.zeros(3, 2)
        >>> packed = sequence_statistics(
        ...     policy, reference, torch.tensor([1, 0, -100]), cu_seqlens=torch.tensor([0, 2, 3]))
        >>> packed.log_ratio
        tensor([0.5662, 0.0000])
        >>> packed.num_tokens
        tensor([2, 0])
    """
    check_token_arguments(policy_logits, reference_logits, labels, ignore_index, temperature)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, policy_logits, "policy_logits", "[tokens, V]")
    elif labels.dim() < 1:
        raise ValueError("Expected `labels` to have shape [..., T], but got ().")
    tokens = token_statistics(
        policy_logits,
        reference_logits,
        labels,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
        inplace_backward=inplace_backward,
    )
    return _reduce(tokens, labels, cu_seqlens, ignore_index, backend)


def sequence_reduction(
    tokens: TokenStatistics,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> SequenceStatistics:
    """What `sequence_statistics` returns, from what `token_statistics` returned.

    Args:
        tokens: Nine tensors [..., T] float32 or float64, or [tokens] with `cu_seqlens`, in nats.
        labels: The same shape, integers: those that the tokens' statistics were made with.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end.
        ignore_index: Tokens with this label do not count.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        SequenceStatistics: tensors [...] (or [sequences]) of sums and means over labelled tokens, in nats,
        differentiable in `tokens`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit, or `cu_seqlens` does not rise from 0 to the number of tokens (checked
            on the CPU).
        RuntimeError: `backend="fused"` does not support the device, or a transform.

    Example:
        >>> import torch
        >>> from lit_did import token_statistics
        >>> from lit_did.ops import sequence_reduction
        >>> labels = torch.tensor([[1, 0, -100]])
        >>> policy, reference = torch.tensor([[[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]]), torch.zeros(1, 3, 2)
        >>> tokens = token_statistics(policy, reference, labels)
        >>> sequence_reduction(tokens, labels).log_ratio
        tensor([0.5662])
    """
    check_tokens(tokens, labels, ignore_index)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels, "labels", "[tokens]")
    return _reduce(tokens, labels, cu_seqlens, ignore_index, backend)


def _reduce(
    tokens: TokenStatistics, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, backend: Backend
) -> SequenceStatistics:
    # long: against a narrow dtype, an `ignore_index` out of its range would wrap round and meet a label.
    labels = labels.long()
    offsets = None if cu_seqlens is None else cu_seqlens.long()
    if choose_backend(backend, labels.device, (*tokens, labels, offsets)) == "fused":
        return fused.sequence_reduction(tokens, labels, offsets, ignore_index)
    return _reference_reduction(tokens, labels, offsets, ignore_index)


def _reference_reduction(
    tokens: TokenStatistics, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int
) -> SequenceStatistics:
    """The specification of the fused reduction, in plain torch."""
    counts = labels != ignore_index
    total = _total_over_sequences(cu_seqlens, counts)
    num_tokens = total(torch.ones_like(labels, dtype=torch.float64))
    dtype = tokens.policy_logprob.dtype

    def summed(values: Tensor) -> Tensor:
        return total(values.double()).to(dtype)

    def mean(values: Tensor) -> Tensor:
        return (total(values.double()) / num_tokens.clamp(min=1)).to(dtype)

    return SequenceStatistics(
        policy_logprob=summed(tokens.policy_logprob),
        reference_logprob=summed(tokens.reference_logprob),
        log_ratio=summed(tokens.policy_logprob.double() - tokens.reference_logprob.double()),
        token_did_entropy=mean(tokens.token_did_entropy),
        token_did_concentration=mean(tokens.token_did_concentration),
        policy_entropy=mean(tokens.policy_entropy),
        reference_entropy=mean(tokens.reference_entropy),
        kl=mean(tokens.kl),
        reverse_kl=mean(tokens.reverse_kl),
        token_did_log_partition=summed(tokens.token_did_log_partition),
        num_tokens=num_tokens.long(),
    )


def _total_over_sequences(cu_seqlens: Tensor | None, counts: Tensor) -> Callable[[Tensor], Tensor]:
    """The sum over each sequence of the tokens that count."""
    if cu_seqlens is None:
        return lambda values: torch.where(counts, values, 0).sum(-1)
    tokens = torch.arange(counts.shape[0], device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    zeros = torch.zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64, device=cu_seqlens.device)
    return lambda values: zeros.index_add(0, sequence, torch.where(counts, values, 0))
