"""Means over sequences and pairs of DPO's implicit reward, beta (log pi(y) - log rho(y)).

Each function has a metric of the same meaning in `lit_did.metrics.rewards`. Both use two functions: one turns
statistics into sums (`*_sums`: float64 totals and int64 counts, which the metric adds up), one turns sums into the
value.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_did.arguments import check_bools, check_integer
from lit_did.functional.inputs import Statistics, as_pairs, as_sequences
from lit_did.functional.preference import LossTerms, check_beta, pair_accuracy, pair_losses, pair_margin
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend

Displacement = Literal["chosen_log_ratio", "rejected_log_ratio", "chosen_fell"]
DISPLACEMENTS: tuple[Displacement, ...] = get_args(Displacement)


def log_ratio_reward(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    beta: float = 0.1,
    per_token: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """DPO's implicit reward beta (log pi(y) - log rho(y)) (arXiv 2305.18290), its mean over sequences.

    Args:
        policy_logits: Logits [..., T, V], or [tokens, V] with `cu_seqlens`. `TokenStatistics` or `SequenceStatistics`
            can take their place. Sequences without labelled tokens do not count.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [..., T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        beta: DPO's inverse temperature, above 0.
        per_token: The mean over tokens of all sequences instead.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, in nats times beta, differentiable in the logits or statistics. NaN without labelled tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy, reference = torch.tensor([[[0.0, 2.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
        >>> log_ratio_reward(policy, reference, torch.tensor([[1, 1]]), beta=0.5)
        tensor(0.4731, dtype=torch.float64)
        >>> log_ratio_reward(policy, reference, torch.tensor([[1, 1]]), beta=0.5, per_token=True)
        tensor(0.2365, dtype=torch.float64)
    """
    check_beta(beta)
    check_bools(per_token=per_token)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return log_ratio_value(*log_ratio_sums(statistics), beta, per_token)


def log_ratio_sums(statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
    """The sum of all log-ratios, and [2] the sequences and the tokens."""
    counts = statistics.num_tokens > 0
    total = torch.where(counts, statistics.log_ratio.double(), 0).sum()
    return total, torch.stack([counts.sum(), statistics.num_tokens.sum()])


def log_ratio_value(total: Tensor, counts: Tensor, beta: float, per_token: bool) -> Tensor:
    return beta * total / counts[int(per_token)]


def reward_margin(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    beta: float = 0.1,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """By how much the policy's implicit reward prefers the chosen completion; its mean over pairs.

    Args:
        policy_logits: Logits [2 pairs, T, V], or [tokens, V] with `cu_seqlens`: the chosen completions first, then the
            rejected ones in the same order. `TokenStatistics` or `SequenceStatistics` can take their place. A pair does
            not count if one of its completions has no labelled tokens.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [2 pairs, T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        beta: DPO's inverse temperature, above 0.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar, in nats times beta, differentiable in the logits or statistics. NaN without pairs.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing; or the number of sequences is odd.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy, reference = torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2)
        >>> reward_margin(policy, reference, torch.tensor([[1], [0]]), beta=0.5)
        tensor(0.5932, dtype=torch.float64)
    """
    check_beta(beta)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    total, pairs = margin_sums(statistics)
    return beta * total / pairs


def margin_sums(statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
    """The sum of the margins at beta = 1, and the pairs."""
    pairs = as_pairs(statistics)
    return pair_margin(pairs.chosen_log_ratio, pairs.rejected_log_ratio, 1).sum(), pairs.counts.sum()


def reward_accuracy(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """The share of pairs whose chosen completion has the higher implicit reward; a tie counts one half.

    Args:
        policy_logits: Logits [2 pairs, T, V], or [tokens, V] with `cu_seqlens`: the chosen completions first, then the
            rejected ones in the same order. `TokenStatistics` or `SequenceStatistics` can take their place. A pair does
            not count if one of its completions has no labelled tokens.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [2 pairs, T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar in [0, 1]. NaN without pairs, or if a pair's log-ratios are NaN.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing; or the number of sequences is odd.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy, reference = torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2)
        >>> reward_accuracy(policy, reference, torch.tensor([[1], [0]]))
        tensor(1., dtype=torch.float64)
    """
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    total, pairs = accuracy_sums(statistics)
    return total / pairs


def accuracy_sums(statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
    """The pairs with the right order, ties one half, and the pairs."""
    pairs = as_pairs(statistics)
    right = pair_accuracy(pairs.chosen_log_ratio, pairs.rejected_log_ratio)
    return torch.where(pairs.counts, right, 0).sum(), pairs.counts.sum()


def likelihood_displacement(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    """How far the log-likelihoods of chosen and rejected completions moved from the reference (arXiv 2410.08847).

    Args:
        policy_logits: Logits [2 pairs, T, V], or [tokens, V] with `cu_seqlens`: the chosen completions first, then the
            rejected ones in the same order. `TokenStatistics` or `SequenceStatistics` can take their place. A pair does
            not count if one of its completions has no labelled tokens.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [2 pairs, T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        Three float64 scalars, NaN without pairs: `chosen_log_ratio` and `rejected_log_ratio`, means over pairs of
        log pi(y) - log rho(y) in nats a completion; `chosen_fell`, the share of pairs whose chosen one is below 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing; or the number of sequences is odd.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy, reference = torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2)
        >>> moved = likelihood_displacement(policy, reference, torch.tensor([[1], [0]]))
        >>> {name: round(float(value), 3) for name, value in moved.items()}
        {'chosen_log_ratio': 0.566, 'rejected_log_ratio': -0.62, 'chosen_fell': 0.0}
    """
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return displacement_value(*displacement_sums(statistics))


def displacement_sums(statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
    """[3] the sums of the log-ratios, chosen and rejected, and of the pairs whose chosen one fell; and the pairs."""
    pairs = as_pairs(statistics)
    chosen, rejected = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    fell = torch.where(chosen.isnan(), chosen, (chosen < 0).double())
    return torch.stack([chosen.sum(), rejected.sum(), fell.sum()]), pairs.counts.sum()


def displacement_value(totals: Tensor, pairs: Tensor) -> dict[str, Tensor]:
    return dict(zip(DISPLACEMENTS, totals / pairs, strict=True))


def reward_calibration(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    beta: float = 0.1,
    num_bins: int = 10,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Expected calibration error (arXiv 1706.04599) of sigmoid(margin), the probability that `chosen` is preferred.

    The confidence in the completion that the reward prefers is sigmoid(|margin|). It falls into one of `num_bins` bins
    of equal width over [1/2, 1]; a bin holds its upper end. ECE = sum over bins of the share of pairs times
    |mean confidence - share of pairs in which `chosen` is the preferred one, ties one half|. This equals the binary
    calibration error, with 2 num_bins bins, of every pair counted in both orders.

    Args:
        policy_logits: Logits [2 pairs, T, V], or [tokens, V] with `cu_seqlens`: the chosen completions first, then the
            rejected ones in the same order. `TokenStatistics` or `SequenceStatistics` can take their place. A pair does
            not count if one of its completions has no labelled tokens.
        reference_logits: The reference's logits, of the same shape. None with statistics.
        labels: [2 pairs, T], or [tokens] with `cu_seqlens`, integers: the token that each position predicts. None with
            `SequenceStatistics`.
        beta: DPO's inverse temperature, above 0.
        num_bins: The number of bins, at least 1.
        cu_seqlens: [sequences + 1] int32 or int64: where packed sequences begin and end. Without it the last dimension
            of `labels` is one sequence.
        ignore_index: Tokens with this label do not count.
        temperature: Both logits are divided by it. It does not change statistics.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        A float64 scalar in [0, 1]. NaN without pairs, or if a pair's log-ratios are NaN.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or is missing; or the number of sequences is odd.
        RuntimeError: `backend="fused"` does not support the device.

    Example:
        >>> policy, reference = torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2)
        >>> reward_calibration(policy, reference, torch.tensor([[1], [0]]), beta=0.5)  # 1 - sigmoid(0.593)
        tensor(0.3559, dtype=torch.float64)
    """
    check_beta(beta)
    check_num_bins(num_bins)
    statistics = as_sequences(
        policy_logits,
        reference_logits,
        labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        backend=backend,
    )
    return calibration_value(*calibration_sums(statistics, beta, num_bins))


def calibration_sums(statistics: SequenceStatistics, beta: float, num_bins: int) -> tuple[Tensor, Tensor]:
    """[2, num_bins] the sums of confidence and of right orders in every bin, and [num_bins] its pairs."""
    pairs = as_pairs(statistics)
    margin = pair_margin(pairs.chosen_log_ratio, pairs.rejected_log_ratio, beta)
    confidence = torch.sigmoid(margin.abs())
    right = pair_accuracy(pairs.chosen_log_ratio, pairs.rejected_log_ratio)
    # ceil - 1: a bin holds its upper end, as in the paper. NaN goes to the last one, and makes it NaN.
    inner = (torch.ceil((confidence - 0.5) * 2 * num_bins) - 1).nan_to_num(num_bins - 1).clamp(0, num_bins - 1).long()
    # One-hot products instead of a scatter, whose order of addition CUDA leaves open.
    member = (inner[:, None] == torch.arange(num_bins, device=inner.device)) & pairs.counts[:, None]  # [pairs, bins]
    totals = [torch.where(member, value[:, None], 0).sum(0) for value in (confidence, right)]
    return torch.stack(totals), member.sum(0)


def calibration_value(totals: Tensor, counts: Tensor) -> Tensor:
    confidence, right = totals
    return (confidence - right).abs().sum() / counts.sum()


def check_num_bins(num_bins: int) -> None:
    """Raises TypeError or ValueError unless `num_bins` is an integer of at least 1."""
    check_integer("num_bins", num_bins, 1)


def losses_of_pairs(
    statistics: SequenceStatistics, terms: LossTerms, *, beta: float, label_smoothing: float, gamma: float | None
) -> Tensor:
    """[pairs] float64: the weighted preference losses, without the SFT term; of log-ratios 0 where a pair does not
    count.

    Args:
        statistics: [2 pairs] the chosen completions first, then the rejected ones in the same order.
        terms: What the loss is made of.
        beta: DPO's inverse temperature.
        label_smoothing: The share of pairs assumed to be labelled the wrong way round.
        gamma: SimPO's margin.
    """
    pairs = as_pairs(statistics._replace(log_ratio=compared_log_ratio(statistics, terms)))
    chosen_num_tokens, rejected_num_tokens = statistics.num_tokens.chunk(2)
    return pair_losses(
        pairs.chosen_log_ratio,
        pairs.rejected_log_ratio,
        terms.preference,
        chosen_num_tokens=chosen_num_tokens,
        rejected_num_tokens=rejected_num_tokens,
        beta=beta,
        label_smoothing=label_smoothing,
        gamma=gamma,
    )


def loss_sums(statistics: SequenceStatistics, losses: Tensor) -> tuple[Tensor, Tensor]:
    """[2] the sums of `losses` [pairs] and of the chosen completions' -log pi, and [2] their pairs and tokens."""
    counts = as_pairs(statistics).counts
    chosen_nll, chosen_num_tokens = -statistics.policy_logprob.chunk(2)[0], statistics.num_tokens.chunk(2)[0]
    totals = [torch.where(counts, value.double(), 0).sum() for value in (losses, chosen_nll)]
    return torch.stack(totals), torch.stack([counts.sum(), torch.where(counts, chosen_num_tokens, 0).sum()])


def loss_value(totals: Tensor, counts: Tensor, sft: float) -> Tensor:
    """The mean loss of a pair, and `sft` times the mean negative log-likelihood of a chosen token."""
    means = totals / counts
    return means[0] + sft * means[1] if sft else means[0]  # 0 times an infinite one would be NaN


def compared_log_ratio(statistics: SequenceStatistics, terms: LossTerms) -> Tensor:
    """[sequences] What `preference_loss` takes for the log-ratio: log pi with a loss that has no reference."""
    return statistics.policy_logprob if terms.reference_free else statistics.log_ratio


def implicit_log_ratio(statistics: SequenceStatistics, terms: LossTerms) -> Tensor:
    """[sequences] The implicit reward of a loss divided by beta, in nats: what `compared_log_ratio` returns, divided by
    the number of tokens where the reward is a mean.

    Example:
        >>> statistics = as_sequences(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), torch.tensor([[3, 5]]))
        >>> [implicit_log_ratio(statistics, LossTerms({loss: 1.0}, 0.0)) for loss in ("cpo", "simpo")]
        [tensor([-4.1589]), tensor([-2.0794])]
    """
    log_ratio = compared_log_ratio(statistics, terms)
    return log_ratio / statistics.num_tokens.clamp(min=1) if terms.per_token_reward else log_ratio
