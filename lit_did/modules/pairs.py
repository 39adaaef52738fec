"""What LitDPO makes of a pair's statistics: what it returns of them, and the metrics that it logs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_did.functional import REFERENCE_FREE_LOSSES
from lit_did.metrics import DIDMetrics, LikelihoodDisplacement, PreferenceLoss
from lit_did.ops import SequenceStatistics

WITHOUT_REFERENCE = ("policy_logprob", "policy_entropy", "num_tokens")
"""what `SequenceStatistics` can tell of a policy alone"""


class PairStatistics(NamedTuple):
    """What `LitDPO.predict_step` tells of every pair: tensors shaped [pairs], in nats.

    With a loss that has no reference, NaN stands in `chosen` and `rejected` for all that needs one.
    """

    index: Tensor
    """the pair's row in its source, int64; -1 where the batch does not say"""
    chosen: SequenceStatistics
    rejected: SequenceStatistics
    loss: Tensor
    reward_margin: Tensor
    """beta (chosen.log_ratio - rejected.log_ratio); of a loss without a reference, its own: docs/losses.md"""


def both_sides(pairs: PairStatistics, weight: Tensor | None = None) -> SequenceStatistics:
    """The statistics [2 pairs] of all completions; pairs of weight 0 have no tokens, so that no metric counts them."""
    both = SequenceStatistics(*(torch.cat(sides) for sides in zip(pairs.chosen, pairs.rejected, strict=True)))
    if weight is None:
        return both
    return both._replace(num_tokens=both.num_tokens * (weight > 0).repeat(2))


def counted(pairs: PairStatistics, weight: Tensor) -> PairStatistics:
    """The pairs of a weight above 0: without the rows that only pad a process's share."""
    kept = weight > 0

    def select(value: Any) -> Any:
        return value[kept] if isinstance(value, Tensor) else type(value)(*map(select, value))

    return select(pairs)


def make_metrics(*, beta: float, loss: str, **loss_options: Any) -> DIDMetrics:
    """What is logged of training or validation with a loss, all in one pass."""
    metrics = DIDMetrics(beta=beta)
    if loss in REFERENCE_FREE_LOSSES:
        for name in metrics.keys() - {"policy_entropy", "reward_margin", "reward_accuracy"}:
            del metrics[name]
        for side in ("chosen", "rejected"):
            metrics.add_metrics({f"{side}_logprob": _Logprob(only=f"{side}_log_ratio")})
    metrics.add_metrics({"loss": PreferenceLoss(beta=beta, loss=loss, **loss_options)})
    return metrics


class _Logprob(LikelihoodDisplacement):
    """Log pi in the place of the log-ratio."""

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return super().sums(statistics._replace(log_ratio=statistics.policy_logprob))
