"""DIDMetrics: all metrics in one collection, with one pass over the logits and one exchange between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_did.functional.information import Unit
from lit_did.functional.inputs import Options, Statistics, as_sequences
from lit_did.functional.rewards import DISPLACEMENTS
from lit_did.metrics.base import StatisticsMetric
from lit_did.metrics.information import (
    PolicyEntropy,
    PolicyKL,
    TokenDIDConcentration,
    TokenDIDEntropy,
    TokenDIDLogPartition,
)
from lit_did.metrics.rewards import (
    LikelihoodDisplacement,
    LogRatioReward,
    RewardAccuracy,
    RewardCalibration,
    RewardMargin,
)
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend


class DIDMetrics(MetricCollection):
    """A `torchmetrics.MetricCollection` of all metrics, each a float64 scalar, with one pass over the logits an update.

    - of tokens: `token_did_entropy`, `token_did_concentration`, `token_did_log_partition`, `policy_entropy`, `kl`,
      `reverse_kl`
    - of sequences: `reward` (a sequence), `reward_per_token`
    - of pairs: `reward_margin`, `reward_accuracy`, `chosen_log_ratio`, `rejected_log_ratio`, `chosen_fell`,
      `calibration_error`

    `update` and `forward` take logits [..., T, V] of the policy and of the reference with labels [..., T], or
    `TokenStatistics` with labels, or `SequenceStatistics`: [2 pairs] sequences, the chosen ones first, then the
    rejected ones in the same order. `compute` returns {name: value}.

    Args:
        beta: DPO's inverse temperature, above 0.
        pairs: Whether the sequences are pairs. False leaves the metrics of pairs out.
        unit: "nats" or "bits", for the metrics of tokens.
        num_bins: The number of bins of `calibration_error`.
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        prefix: Stands before the names in the result.
        postfix: Stands after them.
        kwargs: Arguments of `torchmetrics.Metric` for every metric, such as `sync_on_compute`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import DIDMetrics
        >>> metrics = DIDMetrics(beta=0.5, prefix="val/")
        >>> metrics.update(torch.tensor([[[0.0, 2.0]], [[0.0, 1.0]]]), torch.zeros(2, 1, 2), torch.tensor([[1], [0]]))
        >>> values = metrics.compute()
        >>> round(values["val/token_did_entropy"].item(), 4), values["val/reward_accuracy"].item()
        (0.4738, 1.0)
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        pairs: bool = True,
        unit: Unit = "nats",
        num_bins: int = 10,
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        prefix: str | None = None,
        postfix: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Of `lit_did.functional.as_sequences`.
        self.options: Options = {"ignore_index": ignore_index, "temperature": temperature, "backend": backend}
        common: dict[str, Any] = {**self.options, **kwargs}
        metrics: dict[str, Metric | MetricCollection] = {
            "token_did_entropy": TokenDIDEntropy(unit=unit, **common),
            "token_did_concentration": TokenDIDConcentration(unit=unit, **common),
            "token_did_log_partition": TokenDIDLogPartition(unit=unit, **common),
            "policy_entropy": PolicyEntropy(unit=unit, **common),
            "kl": PolicyKL(unit=unit, **common),
            "reverse_kl": PolicyKL(reverse=True, unit=unit, **common),
            "reward": LogRatioReward(beta=beta, **common),
            "reward_per_token": LogRatioReward(beta=beta, per_token=True, **common),
        }
        if pairs:
            of_pairs: dict[str, Metric] = {
                "reward_margin": RewardMargin(beta=beta, **common),
                "reward_accuracy": RewardAccuracy(**common),
                **{name: LikelihoodDisplacement(only=name, **common) for name in DISPLACEMENTS},
                "calibration_error": RewardCalibration(beta=beta, num_bins=num_bins, **common),
            }
            metrics.update(of_pairs)
        # Without compute groups: an update of all takes less than looking for them, and states are never shared.
        super().__init__(metrics, prefix=prefix, postfix=postfix, compute_groups=False)

    def update(  # type: ignore[override]  # nn.ModuleDict.update, from which MetricCollection inherits, is another
        self,
        policy_logits: Statistics,
        reference_logits: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Adds a batch to every metric.

        Args:
            policy_logits: Logits [..., T, V], or `TokenStatistics` [..., T], or `SequenceStatistics` [sequences].
            reference_logits: [..., T, V] with logits, else None.
            labels: [..., T] with logits or `TokenStatistics`, else None.
            cu_seqlens: [sequences + 1] if logits or token statistics are packed.
        """
        with torch.no_grad():
            super().update(self._sequences(policy_logits, reference_logits, labels, cu_seqlens))

    def forward(
        self,
        policy_logits: Statistics,
        reference_logits: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Adds a batch to every metric and returns the values of this batch, differentiable where the metrics are.

        torchmetrics keeps the last values and their graph. Call `update` if no gradient is wanted.

        Args:
            policy_logits: Logits [..., T, V], or `TokenStatistics` [..., T], or `SequenceStatistics` [sequences].
            reference_logits: [..., T, V] with logits, else None.
            labels: [..., T] with logits or `TokenStatistics`, else None.
            cu_seqlens: [sequences + 1] if logits or token statistics are packed.

        Returns:
            {name: float64 scalar}.
        """
        return super().forward(self._sequences(policy_logits, reference_logits, labels, cu_seqlens))

    def compute(self) -> dict[str, Tensor]:
        """{name: value} of all updates since the last reset, on all processes."""
        members = [
            metric
            for metric in self.values(copy_state=False)
            if isinstance(metric, StatisticsMetric)
            and metric.dist_sync_fn is None
            and metric.sync_on_compute
            and metric.distributed_available_fn()
        ]
        summed = _sum_at_once(members)
        for metric in members:
            metric.dist_sync_fn = summed
            metric._computed = None  # another process may have seen more since
        try:
            return super().compute()
        finally:
            for metric in members:
                metric.dist_sync_fn = None

    def _sequences(self, policy_logits: Any, reference_logits: Any, labels: Any, cu_seqlens: Any) -> SequenceStatistics:
        return as_sequences(policy_logits, reference_logits, labels, cu_seqlens=cu_seqlens, **self.options)


def _sum_at_once(metrics: Sequence[StatisticsMetric]) -> Callable[..., list[Tensor]] | None:
    """A `dist_sync_fn` that knows the sum over all processes of every state: one all_reduce for all metrics together.

    All states are sums. Counts are exact in float64, up to 2**53. Nothing here waits for the device.
    """
    states = [state for metric in metrics for state in metric.metric_state.values() if isinstance(state, Tensor)]
    if not states:
        return None
    flat = torch.cat([state.flatten().double() for state in states])
    dist.all_reduce(flat, group=metrics[0].process_group)
    parts = zip(states, flat.split([state.numel() for state in states]), strict=True)
    sums = {id(state): part.view(state.shape).to(state.dtype) for state, part in parts}
    return lambda state, group=None: [sums[id(state)]]
