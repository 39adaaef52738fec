"""Samplers and a DataLoader whose order is a function of (seed, epoch), can be resumed, and is right on many ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lit_did.data.token_batches import TokenBatchSampler


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that can leave out the first rows of its rank.

    It is one even for a single process: Lightning replaces other samplers in distributed runs.

    Attributes:
        start: How many of this rank's rows the next iteration leaves out. `len()` counts them all the same, because
            Lightning compares it with the batches done in the epoch, including those before resuming.
        epoch_skew: By how much the epochs given to `set_epoch` are ahead of those done; see `ResumableDataLoader`.
    """

    start: int = 0
    epoch_skew: int = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch - self.epoch_skew)


class EvaluationSampler(DistributedSampler):
    """Every row once, in order, dealt out to the ranks one by one.

    Where the rows do not divide by the ranks, the last ranks get positions past the end of the dataset, which
    `PreferenceDataset` answers with rows of weight 0. So all ranks have equally many batches, and weighted means are
    exact. (Repeated rows of weight 1, as DistributedSampler gives, would bias them.)
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class NoValidation(list):
    """No loaders. Lightning warns that the length of this class is zero, so its name says what that means."""


class ResumableDataLoader(DataLoader):
    """A DataLoader that Lightning saves in checkpoints and resumes in the middle of an epoch.

    Its state is the epoch and the number of batches handed out, not fetched ahead by workers. The epoch is its
    sampler's, set by `set_epoch`, which the Trainer calls before each epoch; in a plain loop, the user does.

    A loaded state applies to the next iteration: over the same epoch, it continues after the batches handed out
    (after a finished epoch, it starts again); over a later one, it starts at the first batch of the epoch after the
    state's. That can be an earlier epoch than `set_epoch` said: resuming from a checkpoint saved at the end of an
    epoch, a Trainer with `max_steps` counts that epoch a second time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.batch_sampler, TokenBatchSampler):
            # Beside a batch sampler, DataLoader keeps a SequentialSampler, which Lightning would replace on several
            # ranks; and it forbids to set another one in the usual way.
            object.__setattr__(self, "sampler", self.batch_sampler.sampler)
        self._progress = {"epoch": 0, "batches": 0}
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The progress, and what the order depends on: plain numbers only, as `torch.load(weights_only=True)` wants."""
        if self._resume is not None:
            return self._resume
        skew = getattr(self.sampler, "epoch_skew", 0)
        return {**self._progress, "num_batches": len(self), "epoch_skew": skew, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next iteration continue from `state_dict`, a result of `state_dict()`."""
        self._resume = dict(state_dict)
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.epoch = state_dict["epoch"]
            self.sampler.epoch_skew = state_dict["epoch_skew"]

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens before the first batch is asked for. The Trainer calls iter() before it sets the
        # epoch, and workers would start on the wrong one.
        start = self._claim_start()
        self._progress = {"epoch": getattr(self.sampler, "epoch", 0), "batches": start}
        if isinstance(self.batch_sampler, TokenBatchSampler):
            self.batch_sampler.start = start
            batches = super().__iter__()
        elif isinstance(self.sampler, ResumableSampler):
            self.sampler.start = start * self.batch_size
            batches = super().__iter__()
        else:  # the Trainer has put in another sampler, as it does for `overfit_batches`
            batches = islice(super().__iter__(), start, None)
        for batch in batches:
            self._progress["batches"] += 1
            yield batch

    def _claim_start(self) -> int:
        """The number of batches to leave out. Uses up a loaded state.

        Raises:
            ValueError: If the state belongs to another order, so that its next batch is not the one that was to come.
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
        if not 0 < resume["batches"] < resume["num_batches"]:  # nothing to leave out: the settings may be others
            return 0
        was, now = resume["order"], self._order()
        # A state of before there were token budgets has no key for them.
        changed = [f"{key}={was.get(key)} (now {now[key]})" for key in now if now[key] != was.get(key)]
        if changed:
            raise ValueError(
                f"Expected to resume epoch {epoch} after batch {resume['batches']} with the data settings it was "
                f"started with, but these changed: {', '.join(changed)}. Restore them, or resume from a checkpoint "
                "saved at the end of an epoch."
            )
        return resume["batches"]

    def _order(self) -> dict[str, Any]:
        sampler = self.sampler
        batches = self.batch_sampler if isinstance(self.batch_sampler, TokenBatchSampler) else self
        num_tokens = getattr(batches, "num_tokens", None)
        return {
            "rows": len(self.dataset),
            "batch_size": batches.batch_size,
            "drop_last": batches.drop_last,
            "tokens_per_batch": getattr(batches, "tokens_per_batch", None),
            "lengths_checksum": None if num_tokens is None else zlib.crc32(num_tokens.tobytes()),
            "num_replicas": getattr(sampler, "num_replicas", 1),
            "shuffle": getattr(sampler, "shuffle", False),
            "seed": getattr(sampler, "seed", 0),
        }
