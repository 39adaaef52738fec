"""PairModule: a PolicyModule with an objective that measures pairs in validation, testing and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lit_did.batches.checks import check_pair_values
from lit_did.batches.sequences import Sequences
from lit_did.modules.intervals import with_intervals
from lit_did.modules.objective import Objective
from lit_did.modules.pairs import PairMetrics, PairStatistics, counted
from lit_did.modules.policy_module import PolicyModule
from lit_did.modules.run_facts import data_parallel_size
from lit_did.modules.watch import warn_if_not_finite
from lit_did.ops import SequenceStatistics


class PairModule(PolicyModule):
    """What LitDPO does with pairs that it does not train on. A subclass sets `objective`."""

    objective: Objective
    metrics_class: type[PairMetrics] = PairMetrics
    """what is logged"""

    def __init__(self) -> None:
        super().__init__()
        self.val_metrics: Any = nn.ModuleList()  # one a dataloader
        self.test_metrics: Any = nn.ModuleList()
        self._validation: dict[str, Any] | None = None  # the last one's step and metrics, for checkpoints

    def run_sides(self, sequences: Sequences) -> tuple[SequenceStatistics, SequenceStatistics, Tensor | None]:
        """Runs the models on a batch or a micro-batch, in training, validation, testing and prediction.

        Returns:
            The statistics [pairs] of the chosen and of the rejected completions, and the auxiliary loss of a mixture of
            experts that is configured to return one.
        """
        statistics, auxiliary = self.statistics(sequences)
        pairs = sequences.num_sequences // 2
        halves = (slice(pairs), slice(pairs, None))
        chosen, rejected = (SequenceStatistics(*(v[rows] for v in statistics)) for rows in halves)
        return chosen, rejected, auxiliary

    def forward(self, batch: Mapping[str, Tensor]) -> SequenceStatistics:
        """The statistics of every completion: [2 pairs], chosen first, differentiable in the policy.

        With a loss that has no reference, all but `WITHOUT_REFERENCE` is NaN.
        """
        return self.statistics(self.read(batch))[0]

    def pair_statistics(self, batch: Mapping[str, Tensor]) -> PairStatistics:
        """The statistics, loss and reward margin of every pair of a batch."""
        sequences = self.read(batch, weighted=True)
        check_pair_values(batch, "index", sequences.num_sequences // 2)
        weight, index = batch.get("weight"), batch.get("index")
        mean_chosen_tokens = sequences.mean_chosen_labels(None if weight is None else weight > 0)
        pairs = self.objective.pairs(*self.run_sides(sequences), mean_chosen_tokens)
        return pairs if index is None else pairs._replace(index=index.to(pairs.index.device))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch to the epoch's metrics."""
        self.val_metrics[dataloader_idx].update(self.pair_statistics(batch), batch.get("weight"))

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.test_metrics[dataloader_idx].update(self.pair_statistics(batch), batch.get("weight"))

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> PairStatistics:
        """The statistics of every pair, without the rows that only pad a process's share."""
        pairs = self.pair_statistics(batch)
        return pairs if "weight" not in batch else counted(pairs, batch["weight"])

    def on_validation_epoch_start(self) -> None:
        """Starts one set of metrics for each validation dataloader."""
        self.val_metrics = self._metrics(len(self.trainer.num_val_batches or self.trainer.num_sanity_val_batches))

    def on_test_epoch_start(self) -> None:
        """Starts one set of metrics for each test dataloader."""
        self.test_metrics = self._metrics(len(self.trainer.num_test_batches))

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over the epoch and all processes. Warns if a loss is not finite."""
        metrics = self._log_epoch("val/", self.val_metrics)
        if not self.trainer.sanity_checking:  # which takes a few batches only
            self._validation = {"step": self.trainer.global_step, "metrics": metrics}

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_epoch("test/", self.test_metrics)

    def _metrics(self, loaders: int) -> nn.ModuleList:
        copies = self.trainer.world_size // data_parallel_size(self.trainer)
        options: dict[str, Any] = {} if self.cached_logprobs() is None else {"distributions": False}
        metrics = (self.metrics_class(self.objective, intervals=True, copies=copies, **options) for _ in range(loaders))
        return nn.ModuleList(m.to(self.device) for m in metrics)

    def _log_epoch(self, prefix: str, loaders: Any) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for i, metrics in enumerate(loaders):
            suffix = f"/dataloader_idx_{i}" if len(loaders) > 1 else ""
            values = metrics.log_all(self, prefix, ("loss", "reward_margin", "reward_accuracy"), suffix)
            warn_if_not_finite(f"{prefix}loss{suffix}", values["loss"])
            measured |= with_intervals(values, suffix)
        return measured
