"""What LitDPO makes of a pair's statistics: what it returns of them, and the metrics that it logs."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lit_did.functional.rewards import loss_sums, loss_value
from lit_did.metrics import DIDMetrics, LikelihoodDisplacement
from lit_did.metrics.base import StatisticsMetric
from lit_did.modules.objective import Objective
from lit_did.ops import SequenceStatistics
from lit_did.representing import short_repr

WITHOUT_REFERENCE = ("policy_logprob", "policy_entropy", "num_tokens")
"""what `SequenceStatistics` can tell of a policy alone"""


@short_repr
class PairStatistics(NamedTuple):
    """What `LitDPO.predict_step` tells of every pair: tensors shaped [pairs], in nats.

    With a loss that has no reference, NaN stands in `chosen` and `rejected` for all that needs one.
    """

    index: Tensor
    """the pair's row in its source, int64; -1 where the batch does not say"""
    chosen: SequenceStatistics
    rejected: SequenceStatistics
    loss: Tensor
    """what training minimises, so that its mean over a batch is the batch's. A pair's SFT term is its share of a mean
    over the batch's chosen tokens. A mixture of experts' auxiliary loss, of the tokens given to it at once, is added to
    each pair"""
    reward_margin: Tensor
    """beta (chosen.log_ratio - rejected.log_ratio); of a loss without a reference, its own: docs/losses.md"""
    preference_loss: Tensor
    """`loss` without an SFT term"""


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


class PairMetrics(DIDMetrics):
    """What is logged of training or validation, all in one pass and one exchange between processes."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(beta=objective.beta)
        self._log_ratio = objective.log_ratio
        if objective.reference_free:
            for name in self.keys() - {"policy_entropy", "reward_margin", "reward_accuracy"}:
                del self[name]
            for side in ("chosen", "rejected"):
                self.add_metrics({f"{side}_logprob": _Logprob(only=f"{side}_log_ratio")})
        self.add_metrics({"loss": _Loss(objective.sft)})

    def update(self, pairs: PairStatistics, weight: Tensor | None = None) -> None:
        """Adds pairs, but for those of weight 0."""
        both = both_sides(pairs, weight)
        with torch.no_grad():
            MetricCollection.update(self, both._replace(log_ratio=self._log_ratio(both)), losses=pairs.preference_loss)

    def log_all(
        self, module: lightning.LightningModule, prefix: str, on_progress_bar: tuple[str, ...], suffix: str = ""
    ) -> dict[str, Tensor]:
        """Logs and returns the values over all processes, and starts anew. `bad_gradients` is returned only."""
        values = self.compute()
        for name in (name for name in values if name != "bad_gradients"):
            module.log(
                f"{prefix}{name}{suffix}",
                values[name].float(),
                prog_bar=name in on_progress_bar,
                add_dataloader_idx=False,  # the suffix says it
                sync_dist=prefix == "val/",  # changes nothing, but Lightning warns of epoch ends without it
            )
        self.reset()
        return values


class _Loss(StatisticsMetric):
    """The mean of losses as they were minimised, not computed a second time; and how many gradients were not finite."""

    quantity = "loss"
    totals_shape = (2,)
    counts_shape = (3,)

    def __init__(self, sft: float) -> None:
        super().__init__()
        self.sft = sft

    def update(self, statistics: SequenceStatistics, *, losses: Tensor) -> None:
        """Adds statistics [2 pairs] and the losses [pairs] without their SFT term."""
        self._losses = losses
        super().update(statistics)
        self._losses = None

    def add_bad_gradients(self, count: Tensor | int) -> None:
        """Adds gradients that were not finite."""
        counts = getattr(self, self._counts)
        count = torch.as_tensor(count, device=counts.device)
        setattr(self, self._counts, torch.cat([counts[:2], counts[2:] + count]))

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        totals, counts = loss_sums(statistics, self._losses)
        return totals, torch.nn.functional.pad(counts, (0, 1))

    def value(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_value(totals, counts[:2], self.sft), "bad_gradients": counts[2]}


class _Logprob(LikelihoodDisplacement):
    """Log pi in the place of the log-ratio."""

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return super().sums(statistics._replace(log_ratio=statistics.policy_logprob))
