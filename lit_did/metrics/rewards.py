"""Metrics of DPO's implicit reward: LogRatioReward, of sequences; the others, of preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_did.functional import rewards
from lit_did.functional.preference import check_beta, check_preference_loss
from lit_did.metrics.base import StatisticsMetric
from lit_did.ops import SequenceStatistics


class LogRatioReward(StatisticsMetric):
    """DPO's implicit reward beta (log pi(y) - log rho(y)) (arXiv 2305.18290): its mean over sequences, or over tokens.

    `update` takes logits [..., T, V] of the policy and of the reference with labels [..., T], or `TokenStatistics` with
    labels, or `SequenceStatistics`. Sequences without labelled tokens do not count. `compute` returns a float64 scalar,
    in nats times beta; NaN before there is a sequence.

    Args:
        beta: DPO's inverse temperature, above 0.
        per_token: The mean over tokens instead, all sequences together.
        ignore_index: Labels that are skipped, where `update` is given labels.
        temperature: Both logits are divided by it, where `update` is given logits.
        backend: "auto", "fused" or "reference", as in `lit_did.token_statistics`.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: An argument is out of range.

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

    def __init__(self, *, beta: float = 0.1, per_token: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_beta(beta)
        self.beta, self.per_token = beta, per_token

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.log_ratio_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return rewards.log_ratio_value(totals, counts, self.beta, self.per_token)


class RewardMargin(StatisticsMetric):
    """By how much the policy's implicit reward prefers the chosen completion: its mean over pairs.

    `update` takes what `LogRatioReward` takes, of [2 pairs] sequences: the chosen ones first, then the rejected ones in
    the same order. A pair of which a completion has no labelled tokens does not count: labels of `ignore_index` alone
    leave it out. `compute` returns a float64 scalar, in nats times beta; NaN before there is a pair.

    Args:
        beta: DPO's inverse temperature, above 0.
        ignore_index, temperature, backend, kwargs: As in `LogRatioReward`.

    Raises:
        TypeError, ValueError: An argument is out of range.

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

    def __init__(self, *, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_beta(beta)
        self.beta = beta

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.margin_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return self.beta * totals / counts


class RewardAccuracy(StatisticsMetric):
    """The share of pairs whose chosen completion has the higher implicit reward; a tie counts one half.

    Input, arguments and errors: as `RewardMargin`, without `beta`. `compute` returns a float64 scalar in [0, 1].

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

    Input, other arguments and errors: as `RewardMargin`, without `beta`. `compute` returns three float64 scalars, or
    one of them: `chosen_log_ratio` and `rejected_log_ratio`, means over pairs of log pi(y) - log rho(y) in nats a
    completion; `chosen_fell`, the share of pairs whose chosen one is below 0.

    Args:
        only: The name of the one to return, as a scalar; None returns a dict of all three.

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

    def __init__(self, *, only: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if only is not None and only not in rewards.DISPLACEMENTS:
            choices = ", ".join(map(repr, rewards.DISPLACEMENTS))
            raise ValueError(f"Expected `only` to be None or one of {choices}, but got {only!r}.")
        self.only = only

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.displacement_sums(statistics)

    def value(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor] | Tensor:
        values = rewards.displacement_value(totals, counts)
        return values if self.only is None else values[self.only]


class RewardCalibration(StatisticsMetric):
    """Expected calibration error (arXiv 1706.04599) of sigmoid(margin), the probability that `chosen` is preferred.

    Confidence in the preferred completion against how often `chosen` is the one, over bins of equal width on [1/2, 1]:
    `lit_did.functional.reward_calibration` has the formula. Input and errors: as `RewardMargin`. `compute` returns a
    float64 scalar in [0, 1].

    Args:
        beta: DPO's inverse temperature, above 0.
        num_bins: At least 1.
        ignore_index, temperature, backend, kwargs: As in `LogRatioReward`.

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

    def __init__(self, *, beta: float = 0.1, num_bins: int = 10, **kwargs: Any) -> None:
        check_beta(beta)
        rewards.check_num_bins(num_bins)
        self.totals_shape, self.counts_shape = (2, num_bins), (num_bins,)
        super().__init__(settings={"beta": beta}, **kwargs)
        self.beta, self.num_bins = beta, num_bins

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.calibration_sums(statistics, self.beta, self.num_bins)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return rewards.calibration_value(totals, counts)


class PreferenceLoss(StatisticsMetric):
    """`lit_did.functional.preference_loss`, its mean over pairs: what DPO's training minimises.

    The SFT term, where the loss has one, is a mean over all chosen tokens. Input: as `RewardMargin`; of the reference a
    loss without one reads nothing. `compute` returns a float64 scalar.

    Args:
        beta, loss, label_smoothing, gamma, nll_weight: As in `lit_did.functional.preference_loss`.
        ignore_index, temperature, backend, kwargs: As in `LogRatioReward`.

    Raises:
        TypeError, ValueError: An argument is out of range.

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
        loss: str | Mapping[str, float] = "sigmoid",
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        nll_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.options = {"beta": beta, "label_smoothing": label_smoothing, "gamma": gamma}
        self.terms = check_preference_loss(loss=loss, nll_weight=nll_weight, **self.options)
        super().__init__(settings={**self.options, "loss": loss, "nll_weight": nll_weight}, **kwargs)

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return rewards.loss_sums(statistics, rewards.losses_of_pairs(statistics, self.terms, **self.options))

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return rewards.loss_value(totals, counts, self.terms.sft)
