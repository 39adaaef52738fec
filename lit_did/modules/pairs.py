"""The statistics of pairs: what LitDPO's `predict_step` returns, and the metrics that it logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lit_did.batches.moving import to_device
from lit_did.functional.rewards import loss_sums, loss_value
from lit_did.metrics import DIDMetrics, LikelihoodDisplacement
from lit_did.metrics.base import StatisticsMetric
from lit_did.modules.intervals import PairMoments
from lit_did.ops import SequenceStatistics
from lit_did.representing import short_repr

if TYPE_CHECKING:
    from lit_did.modules.objective import Objective

WITHOUT_REFERENCE = ("policy_logprob", "policy_entropy", "num_tokens")
"""the fields of `SequenceStatistics` that need no reference"""
OF_DISTRIBUTIONS = ("token_did_entropy", "token_did_concentration", "token_did_log_partition", "kl", "reverse_kl")
"""the metrics that need the reference's whole distributions, and not only its log-probabilities of completions"""


@short_repr
class PairStatistics(NamedTuple):
    """The statistics of pairs, as `LitDPO.predict_step` returns them: tensors [pairs], in nats.

    With a loss that needs no reference, values in `chosen` and `rejected` that need one are NaN.
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    """int64: the pair's row in its source. -1: the batch does not have it."""
    chosen: SequenceStatistics
    rejected: SequenceStatistics
    loss: Tensor
    """The pair's loss. Its mean over a batch is the batch's loss without the entropy term. A pair's SFT term is its
    share of a mean over the batch's chosen tokens. The auxiliary loss of a mixture of experts, which belongs to all
    tokens of a forward pass, is added to every pair."""
    reward_margin: Tensor
    """beta (chosen.log_ratio - rejected.log_ratio). Losses without a reference have others: `lit-did docs losses`."""
    preference_loss: Tensor
    """`loss` without the SFT term."""


def both_sides(pairs: PairStatistics, weight: Tensor | None = None) -> SequenceStatistics:
    """The statistics [2 pairs] of all completions; pairs of weight 0 have no tokens, so that no metric counts them."""
    both = SequenceStatistics(*(torch.cat(sides) for sides in zip(pairs.chosen, pairs.rejected, strict=True)))
    if weight is None:
        return both
    counts = to_device((weight > 0).repeat(2), both.num_tokens.device)
    return both._replace(num_tokens=both.num_tokens * counts)


def of_policy_alone(statistics: SequenceStatistics) -> SequenceStatistics:
    """The statistics with NaN in the place of all that needs a reference."""
    undefined = torch.full_like(statistics.policy_logprob, torch.nan, requires_grad=False)
    kept = {name: getattr(statistics, name) for name in WITHOUT_REFERENCE}
    return SequenceStatistics(**dict.fromkeys(SequenceStatistics._fields, undefined) | kept)


def with_reference_logprob(statistics: SequenceStatistics, logprob: Tensor) -> SequenceStatistics:
    """The statistics of `of_policy_alone` with what the reference's log-probabilities [sequences] add."""
    log_ratio = statistics.policy_logprob.double() - logprob.double()
    dtype = statistics.policy_logprob.dtype
    return statistics._replace(reference_logprob=logprob.to(dtype), log_ratio=log_ratio.to(dtype))


def counted(pairs: PairStatistics, weight: Tensor) -> PairStatistics:
    """The pairs of a weight above 0: without the rows that only pad a process's share."""
    # Rows found on the CPU: a mask on a GPU would make the process wait for it.
    kept = to_device((weight > 0).nonzero()[:, 0], pairs.loss.device)

    def select(value: Any) -> Any:
        return value[kept] if isinstance(value, Tensor) else type(value)(*map(select, value))

    return select(pairs)


class PairMetrics(DIDMetrics):
    """The metrics that are logged in training or validation, computed in one pass and one exchange between processes.

    Args:
        objective: The loss that training minimises.
        intervals: Whether `compute` also returns "num_pairs" and the metrics' 95% intervals, see `PairMoments`.
        copies: How many processes get every batch.
        distributions: Whether the pairs have what needs the reference's whole distributions. False leaves out
            `OF_DISTRIBUTIONS`.
    """

    def __init__(
        self, objective: Objective, *, intervals: bool = False, copies: int = 1, distributions: bool = True
    ) -> None:
        super().__init__(beta=objective.beta)
        self._log_ratio = objective.log_ratio
        for name in () if distributions else OF_DISTRIBUTIONS:
            del self[name]
        if objective.reference_free:
            for name in set(map(str, self.keys())) - {"policy_entropy", "reward_margin", "reward_accuracy"}:
                del self[name]
            chosen, rejected = _Logprob(only="chosen_log_ratio"), _Logprob(only="rejected_log_ratio")
            self.add_metrics({"chosen_logprob": chosen, "rejected_logprob": rejected})
        self.add_metrics({"loss": _Loss(objective.sft)})
        if intervals:
            names = tuple(map(str, self.keys()))
            self.add_metrics({"moments": PairMoments(names, beta=objective.beta, sft=objective.sft, copies=copies)})

    def update(  # type: ignore[override]  # pairs with their losses, not logits
        self, pairs: PairStatistics, weight: Tensor | None = None
    ) -> None:
        """Adds the pairs, except those with a `weight` [pairs] of 0."""
        both = both_sides(pairs, weight)
        with torch.no_grad():
            MetricCollection.update(self, both._replace(log_ratio=self._log_ratio(both)), losses=pairs.preference_loss)

    def log_all(
        self, module: lightning.LightningModule, prefix: str, on_progress_bar: tuple[str, ...], suffix: str = ""
    ) -> dict[str, Tensor]:
        """Logs and returns the values over all processes, and resets the metrics.

        It is one exchange between processes and one copy from the device, for which the host waits.

        Args:
            module: The module that logs.
            prefix: Is put before each name: "train/", "val/" or "test/".
            on_progress_bar: The names that the progress bar shows.
            suffix: Is put after each name, such as the number of the dataloader.

        Returns:
            Scalars by name, and intervals, all on the CPU. `bad_steps`, `num_pairs` and intervals are not logged.
        """
        values = on_host(self.compute())
        unlogged = ("bad_steps", "num_pairs", "interval/")
        for name in (name for name in values if not name.startswith(unlogged)):
            module.log(
                f"{prefix}{name}{suffix}",
                values[name].float(),
                prog_bar=name in on_progress_bar,
                add_dataloader_idx=False,  # the suffix has it
                # They are over all processes already. Without `sync_dist`, Lightning warns at the end of an epoch, and
                # with it alone, it would exchange each of them.
                sync_dist=prefix != "train/",
                rank_zero_only=True,
            )
        self.reset()
        return values


def on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values on the CPU. Those that are on a device take one copy together."""
    there = {name: value.detach() for name, value in values.items() if value.device.type != "cpu"}
    if not there:
        return dict(values)
    flat = torch.cat([value.double().flatten() for value in there.values()]).cpu()
    parts = zip(there.items(), flat.split([value.numel() for value in there.values()]), strict=True)
    return dict(values) | {name: part.view(value.shape).to(value.dtype) for (name, value), part in parts}


class _Loss(StatisticsMetric):
    """The mean of the losses, which training has already computed, and how many processes saw a step that was bad."""

    quantity = "loss"
    totals_shape = (2,)
    counts_shape = (3,)

    def __init__(self, sft: float) -> None:
        super().__init__()
        self.sft = sft
        self._losses: Tensor | None = None  # while `update` runs

    def update(  # type: ignore[override]  # statistics with their losses
        self, statistics: SequenceStatistics, *, losses: Tensor
    ) -> None:
        """Adds statistics [2 pairs] and the losses [pairs] without their SFT term."""
        self._losses = losses
        super().update(statistics)
        self._losses = None

    def add_bad_steps(self, count: Tensor) -> None:
        """Adds a number of steps whose loss or gradient was not finite."""
        counts = getattr(self, self._counts)
        setattr(self, self._counts, torch.cat([counts[:2], counts[2:] + count]))

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        assert self._losses is not None
        totals, counts = loss_sums(statistics, self._losses)
        return totals, torch.nn.functional.pad(counts, (0, 1))

    def value(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_value(totals, counts[:2], self.sft), "bad_steps": counts[2]}


class TokenLoss(_Loss):
    """The mean negative log-likelihood of a token, `nll`, and with what is added to a pair's loss, `loss`.

    Args:
        copies: How many processes get every batch.
    """

    quantity = "nll"

    def __init__(self, copies: int = 1) -> None:
        super().__init__(sft=1.0)
        self.copies = copies

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        assert self._losses is not None
        counts = statistics.num_tokens > 0
        nll = torch.where(counts, -statistics.policy_logprob.double(), 0).sum()
        totals = torch.stack([self._losses.double().sum(), nll])
        numbers = [torch.full_like(statistics.num_tokens.sum(), len(self._losses)), statistics.num_tokens.sum()]
        return totals, torch.nn.functional.pad(torch.stack(numbers).long(), (0, 1))

    def value(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor]:
        return super().value(totals, counts) | {"nll": totals[1] / counts[1], "num_pairs": counts[0] // self.copies}


class _Logprob(LikelihoodDisplacement):
    """The mean of the policy's log-probability instead of the log-ratio."""

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return super().sums(statistics._replace(log_ratio=statistics.policy_logprob))
