"""Metrics of DPO's implicit reward: LogRatioReward is of sequences, the others are of preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_did.arguments import check_bools, check_choice
from lit_did.functional import rewards
from lit_did.functional.preference import LossName, check_beta, check_preference_loss
from lit_did.metrics.base import StatisticsMetric
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend


class LogRatioReward(StatisticsMetric):
    """DPO's implicit reward beta (log pi(y) - log rho(y)) (arXiv 2305.18290): its mean over sequences, or over tokens.

    `update` takes logits [..., T, V] of policy and reference with labels [..., T], or `TokenStatistics` with labels, or
    `SequenceStatistics`. Sequences without labelled tokens do not count. `compute` returns a float64 scalar, in nats
    times beta, NaN before the first sequence.

    Args:
        beta: DPO's inverse temperature, above 0.
        per_token: The mean over tokens of all sequences instead.
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import LogRatioReward
        >>> metric = LogRatioReward(beta=0.5)
        >>> metric.update(torch.tensor([[[0.0, 2.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2), torch.tensor([[1, 1]]))
        >>> metric.compute()
        tensor(0.4731, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = None
    quantity = "log_ratio"
    counts_shape = (2,)

    def __init__(
        self,
        *,
        beta: float = 0.1,
        per_token: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(ignore_index=ignore_index, temperature=temperature, backend=backend, **kwargs)
        check_beta(beta)
        check_bools(per_token=per_token)
        self.beta, self.per_token = beta, per_token

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.log_ratio_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return rewards.log_ratio_value(totals, counts, self.beta, self.per_token)


class RewardMargin(StatisticsMetric):
    """By how much the policy's implicit reward prefers the chosen completion: its mean over pairs.

    `update` takes logits [2 pairs, T, V] of policy and reference with labels [2 pairs, T], or `TokenStatistics` with
    labels, or `SequenceStatistics`: the chosen completions first, then the rejected ones in the same order. A pair does
    not count if one of its completions has no labelled tokens. `compute` returns a float64 scalar, in nats times beta,
    NaN before the first pair.

    Args:
        beta: DPO's inverse temperature, above 0.
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import RewardMargin
        >>> metric = RewardMargin(beta=0.5)
        >>> metric.update(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2), torch.tensor([[1], [0]]))
        >>> metric.compute()
        tensor(0.5932, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True
    quantity = "margin"

    def __init__(
        self,
        *,
        beta: float = 0.1,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(ignore_index=ignore_index, temperature=temperature, backend=backend, **kwargs)
        check_beta(beta)
        self.beta = beta

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.margin_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return self.beta * totals / counts


class RewardAccuracy(StatisticsMetric):
    """The share of pairs whose chosen completion has the higher implicit reward; a tie counts one half.

    `update` takes logits [2 pairs, T, V] of policy and reference with labels [2 pairs, T], or `TokenStatistics` with
    labels, or `SequenceStatistics`: the chosen completions first, then the rejected ones in the same order. A pair does
    not count if one of its completions has no labelled tokens. `compute` returns a float64 scalar in [0, 1], NaN before
    the first pair.

    Args:
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import RewardAccuracy
        >>> metric = RewardAccuracy()
        >>> metric.update(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2), torch.tensor([[1], [0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    quantity = "right_order"

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.accuracy_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return totals / counts


class LikelihoodDisplacement(StatisticsMetric):
    """How far the log-likelihoods of chosen and rejected completions moved from the reference (arXiv 2410.08847).

    `update` takes logits [2 pairs, T, V] of policy and reference with labels [2 pairs, T], or `TokenStatistics` with
    labels, or `SequenceStatistics`: the chosen completions first, then the rejected ones in the same order. A pair does
    not count if one of its completions has no labelled tokens. `compute` returns three float64 scalars, or one of them,
    NaN before the first
    pair: `chosen_log_ratio` and `rejected_log_ratio`, means over pairs of log pi(y) - log rho(y) in nats a completion;
    `chosen_fell`, the share of pairs whose chosen one is below 0.

    Args:
        only: The name of the one to return, as a scalar. None: a dict of all three.
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import LikelihoodDisplacement
        >>> metric = LikelihoodDisplacement()
        >>> metric.update(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2), torch.tensor([[1], [0]]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'chosen_log_ratio': 0.566, 'rejected_log_ratio': -0.62, 'chosen_fell': 0.0}
    """

    is_differentiable = False
    higher_is_better = None
    quantity = "displacement"
    totals_shape = (3,)

    def __init__(
        self,
        *,
        only: rewards.Displacement | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(ignore_index=ignore_index, temperature=temperature, backend=backend, **kwargs)
        if only is not None:
            check_choice("only", only, rewards.Displacement)
        self.only = only

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.displacement_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor] | Tensor:
        values = rewards.displacement_value(totals, counts)
        return values if self.only is None else values[self.only]


class RewardCalibration(StatisticsMetric):
    """Expected calibration error (arXiv 1706.04599) of sigmoid(margin), the probability that `chosen` is preferred.

    It compares the confidence in the preferred completion with how often `chosen` is the preferred one, in bins of
    equal width on [1/2, 1]. `lit-did docs metrics` has the formula.

    `update` takes logits [2 pairs, T, V] of policy and reference with labels [2 pairs, T], or `TokenStatistics` with
    labels, or `SequenceStatistics`: the chosen completions first, then the rejected ones in the same order. A pair does
    not count if one of its completions has no labelled tokens. `compute` returns a float64 scalar in [0, 1], NaN before
    the first pair.

    Args:
        beta: DPO's inverse temperature, above 0.
        num_bins: The number of bins, at least 1.
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import RewardCalibration
        >>> metric = RewardCalibration(beta=0.5)
        >>> metric.update(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2), torch.tensor([[1], [0]]))
        >>> metric.compute()
        tensor(0.3559, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    quantity = "calibration"

    def __init__(
        self,
        *,
        beta: float = 0.1,
        num_bins: int = 10,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_beta(beta)
        rewards.check_num_bins(num_bins)
        self.totals_shape, self.counts_shape = (2, num_bins), (num_bins,)
        super().__init__(
            settings={"beta": beta},
            ignore_index=ignore_index,
            temperature=temperature,
            backend=backend,
            **kwargs,
        )
        self.beta, self.num_bins = beta, num_bins

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.calibration_sums(statistics, self.beta, self.num_bins)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return rewards.calibration_value(totals, counts)


class PreferenceLoss(StatisticsMetric):
    """The mean over pairs of a preference loss: what DPO's training minimises. `lit-did docs losses` lists the losses.

    The SFT term, if the loss has one, is a mean over all chosen tokens. A loss without a reference reads nothing of the
    reference.

    `update` takes logits [2 pairs, T, V] of policy and reference with labels [2 pairs, T], or `TokenStatistics` with
    labels, or `SequenceStatistics`: the chosen completions first, then the rejected ones in the same order. A pair does
    not count if one of its completions has no labelled tokens. `compute` returns a float64 scalar, NaN before the first
    pair.

    Args:
        beta: DPO's inverse temperature, above 0.
        loss: The name of a loss, or a weighted sum such as `{"sigmoid": 0.8, "sft": 0.2}`.
        label_smoothing: The share of pairs assumed to be labelled the wrong way round, in [0, 0.5), for losses that
            have it.
        gamma: The margin to reach, at least 0. None: 0.5. Only with "simpo".
        nll_weight: The weight of the SFT term, at least 0. None: the loss's own.
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import PreferenceLoss
        >>> metric = PreferenceLoss(beta=0.5)
        >>> metric.update(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2), torch.tensor([[1], [0]]))
        >>> metric.compute()
        tensor(0.4399, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = False
    quantity = "loss"
    totals_shape = (2,)
    counts_shape = (2,)

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss: LossName | Mapping[str, float] = "sigmoid",
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        nll_weight: float | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        self.beta, self.label_smoothing, self.gamma = beta, label_smoothing, gamma
        self.terms = check_preference_loss(
            beta=beta, loss=loss, label_smoothing=label_smoothing, gamma=gamma, nll_weight=nll_weight
        )
        super().__init__(
            settings={
                "beta": beta,
                "label_smoothing": label_smoothing,
                "gamma": gamma,
                "loss": loss,
                "nll_weight": nll_weight,
            },
            ignore_index=ignore_index,
            temperature=temperature,
            backend=backend,
            **kwargs,
        )

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        losses = rewards.losses_of_pairs(
            statistics, self.terms, beta=self.beta, label_smoothing=self.label_smoothing, gamma=self.gamma
        )
        return rewards.loss_sums(statistics, losses)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return rewards.loss_value(totals, counts, self.terms.sft)
