"""Samplers and a DataLoader with an order that depends on seed and epoch only, and that a run can resume."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lit_did.data.dealing import deal
from lit_did.data.token_batches import TokenBatchSampler


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that gives all ranks equal work, and that can leave out the first rows of its rank.

    A step is the next `batch_size` times ranks rows of the order. So its rows depend on this product only, and not on
    the number of ranks. `lit_did.data.dealing` deals them to the ranks. A single process uses this sampler too, because
    Lightning replaces other samplers in distributed runs.

    Args:
        arguments: Those of `torch.utils.data.DistributedSampler`.
        num_tokens: [rows] The tokens of each row. None: all rows are equally long.
        batch_size: The rows of a batch.
        options: As `arguments`.

    Attributes:
        start: The number of this rank's rows that the next iteration leaves out. `len()` still counts them, because
            Lightning compares it with all batches of the epoch, including those before resuming.
        epoch_skew: The number of epochs by which `set_epoch` is ahead of those done; see `ResumableDataLoader`.
    """

    start: int = 0
    epoch_skew: int = 0

    def __init__(
        self, *arguments: Any, num_tokens: np.ndarray | None = None, batch_size: int = 1, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        rows: Any = self.dataset
        self.num_tokens = np.ones(len(rows), dtype=np.int64) if num_tokens is None else num_tokens
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        order, size = self._order(), self.batch_size * self.num_replicas
        steps = (order[start : start + size] for start in range(0, len(order), size))
        own = (step[deal(self.num_tokens[step], self.num_replicas, self.rank)].tolist() for step in steps)
        return islice(chain.from_iterable(own), self.start, None)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch - self.epoch_skew)

    def _order(self) -> np.ndarray:
        """The rows of the epoch, of all ranks. The first ones are repeated or the last ones left out, so that all
        ranks have equally many."""
        rows: Any = self.dataset
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(rows), generator=generator).numpy() if self.shuffle else np.arange(len(rows))
        return np.resize(order, self.total_size)


class EvaluationSampler(DistributedSampler):
    """Every row once, in order: row i goes to rank i modulo the number of ranks.

    If the number of rows is not divisible by the number of ranks, the last ranks get positions past the end of the
    dataset. For these, `PreferenceDataset` returns rows of weight 0. So all ranks have the same number of batches, and
    weighted means are exact. DistributedSampler repeats rows with weight 1 instead, which would bias them.

    Args:
        dataset: A dataset with a length.
        num_replicas: The number of ranks.
        rank: The number of this rank, from 0.
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


def replicas(trainer: Any) -> dict[str, int]:
    """The arguments `num_replicas` and `rank` of a sampler: of the processes that get batches of their own.

    The processes of a tensor-parallel or context-parallel group get the same batches.
    """
    given = getattr(trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
    size = getattr(getattr(trainer, "lightning_module", None), "context_parallel_size", 1)
    return {name: number // size for name, number in given.items()}


class NoValidation(list):
    """No loaders. Lightning's warning about its length shows the name of this class, which explains it."""


class ResumableDataLoader(DataLoader):
    """A DataLoader that Lightning saves in checkpoints and resumes in the middle of an epoch.

    Its arguments are those of `torch.utils.data.DataLoader`. Its state is the epoch and the number of batches that were
    returned; batches that workers fetched ahead do not count. The epoch is the sampler's. The Trainer sets it with
    `set_epoch` before each epoch; in a plain loop, you do.

    A run may resume with another number of ranks if `batch_size` times ranks stays the same: then every step has the
    same pairs. With `tokens_per_batch` the number of ranks has to stay too.

    A loaded state applies to the next iteration. In the same epoch, the iteration continues after the batches that were
    returned, or starts again if the epoch was finished. In a later epoch, it starts at the first batch of the epoch
    after the state's. That can be an earlier epoch than `set_epoch` said, because a Trainer with `max_steps` counts an
    epoch twice when it resumes from a checkpoint saved at its end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.batch_sampler, TokenBatchSampler):
            # With a batch sampler, DataLoader keeps a SequentialSampler, which Lightning would replace on several
            # ranks. DataLoader does not allow an ordinary assignment.
            object.__setattr__(self, "sampler", self.batch_sampler.sampler)
        self._progress = {"epoch": 0, "batches": 0}
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The progress, and the settings that the order depends on, as plain numbers for `weights_only=True`."""
        if self._resume is not None:
            return self._resume
        skew = getattr(self.sampler, "epoch_skew", 0)
        return {**self._progress, "num_batches": len(self), "epoch_skew": skew, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next iteration continue from a result of `state_dict()`."""
        self._resume = dict(state_dict)
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.epoch = state_dict["epoch"]
            self.sampler.epoch_skew = state_dict["epoch_skew"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts with the first batch. The Trainer calls iter() before it sets the epoch, and workers would
        # start on the wrong one.
        start = self._claim_start()
        self._progress = {"epoch": getattr(self.sampler, "epoch", 0), "batches": start}
        if isinstance(self.batch_sampler, TokenBatchSampler):
            self.batch_sampler.start = start
            batches: Iterator[Any] = super().__iter__()
        elif isinstance(self.sampler, ResumableSampler):
            assert self.batch_size is not None  # without a batch sampler, there is one
            self.sampler.start = start * self.batch_size
            batches = super().__iter__()
        else:  # the Trainer has set another sampler, as for `overfit_batches`
            batches = islice(super().__iter__(), start, None)
        for batch in batches:
            self._progress["batches"] += 1
            yield batch

    def _claim_start(self) -> int:
        """The number of batches to leave out. Clears the loaded state.

        Raises:
            ValueError: If the state belongs to another order, so that the next batch would be another one.
        """
        resume, self._resume = self._resume, None
        if resume is None:
            return 0
        epoch = getattr(self.sampler, "epoch", resume["epoch"])
        if epoch != resume["epoch"]:
            expected = resume["epoch"] + 1
            if epoch > expected and isinstance(self.sampler, ResumableSampler):  # as the docstring says
                self.sampler.epoch_skew += epoch - expected
                self.sampler.epoch = expected
            return 0
        if not 0 < resume["batches"] < resume["num_batches"]:  # nothing to leave out: the settings may differ
            return 0
        was, now = resume["order"], self._order()
        changed = [f"{key}={was.get(key)} (now {now.get(key)})" for key in was | now if was.get(key) != now.get(key)]
        if changed:
            raise ValueError(
                f"Expected to resume epoch {epoch} after batch {resume['batches']} with the data settings it was "
                f"started with, but these changed: {', '.join(changed)}. Restore them, or resume from a checkpoint "
                "saved at the end of an epoch."
            )
        return resume["batches"]

    def _order(self) -> dict[str, Any]:
        sampler, batches = self.sampler, self.batch_sampler
        ranks = getattr(sampler, "num_replicas", 1)
        order = {
            "rows": len(self.dataset),  # type: ignore[arg-type]  # a Dataset need not have a length; ours does
            "drop_last": self.drop_last,
            "shuffle": getattr(sampler, "shuffle", False),
            "seed": getattr(sampler, "seed", 0),
            "weights": sampler.mixture.weights if hasattr(sampler, "mixture") else None,
        }
        if not isinstance(batches, TokenBatchSampler):
            assert self.batch_size is not None
            return {**order, "batch_size * num_replicas": self.batch_size * ranks}  # the pairs of a step
        return {
            **order,
            "drop_last": batches.drop_last,
            "batch_size": batches.batch_size,
            "tokens_per_batch": batches.tokens_per_batch,
            "lengths_checksum": zlib.crc32(batches.num_tokens.tobytes()),
            "num_replicas": ranks,
        }
