"""Training batches by a budget of tokens: as many pairs as fit, of similar length, equally many on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler, Sampler
from torch.utils.data.distributed import DistributedSampler


class TokenBatchSampler(BatchSampler):
    """Batches of at most `tokens_per_batch` tokens for `ResumableDataLoader`.

    The order of the pairs is cut into steps, and a step is dealt out to the ranks: all get equally many of its pairs,
    and numbers of tokens that differ by at most as much as the step's longest pair does from its shortest. Where the
    pairs do not divide by the ranks, the first of the order are repeated, or with `drop_last` the last left out. A
    step may have few long pairs or many short ones; in a mean over its pairs, a pair weighs accordingly.

    Shuffled, an epoch orders the pairs by their lengths, each taken for up to 1/32 more at random, cuts that into steps
    of nearly equal tokens, and orders the steps at random. So pairs meet others of about their length; in a small data
    set, often the same ones. Every epoch has the same number of steps with the same numbers of pairs: Lightning reads
    the length of a loader once, and learning rate schedules count on it. Not shuffled, a step takes the pairs that come
    next in the source, as many as fit.

    Args:
        sampler: A DistributedSampler, whose `shuffle`, `seed`, `drop_last` and `epoch` make the order; it is not
            iterated. Any other (the SequentialSampler that Lightning puts in for `overfit_batches`) stands for the
            order of the source.
        num_tokens: (pairs,) the tokens of each pair.
        tokens_per_batch: The most tokens of a batch.
        batch_size: The most pairs of a batch; None for no limit.
        num_replicas, rank: How many ranks there are, and which of them this is.

    Attributes:
        start: How many of its batches the next iteration leaves out.

    Raises:
        ValueError: If a pair alone has more than `tokens_per_batch` tokens.

    >>> list(TokenBatchSampler(range(5), num_tokens=[40, 30, 50, 20, 60], tokens_per_batch=100))
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        sampler: Sampler,
        num_tokens: np.ndarray,
        tokens_per_batch: int,
        batch_size: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.num_tokens = np.asarray(num_tokens, dtype=np.int64)
        if self.num_tokens.max() > tokens_per_batch:
            raise ValueError(
                f"Expected `tokens_per_batch` to be at least {self.num_tokens.max()}, the tokens of the longest pair, "
                f"but got {tokens_per_batch}."
            )
        if not isinstance(sampler, DistributedSampler):  # on several ranks, Lightning would try to replace it once more
            sampler = DistributedSampler(self.num_tokens, num_replicas, rank, shuffle=False)
        self.sampler, self.tokens_per_batch, self.batch_size = sampler, tokens_per_batch, batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.shuffle, self.seed, self.drop_last = sampler.shuffle, sampler.seed, sampler.drop_last
        self.start = 0
        whole, left = divmod(len(self.num_tokens), self.num_replicas)
        self._total = (whole + (left > 0 and not self.drop_last)) * self.num_replicas
        self._ends = self._plan()

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        order, numbers = np.resize(np.arange(len(self.num_tokens)), self._total), np.arange(len(self))
        if self.shuffle:
            generator = np.random.default_rng((self.seed, self.sampler.epoch))
            order = np.resize(generator.permutation(len(self.num_tokens)), self._total)
            lengths = self._lengthened(generator.random(len(self.num_tokens)))
            order = order[np.argsort(lengths[order], kind="stable")]
            numbers = generator.permutation(numbers)
        steps = np.split(order, self._ends[:-1])
        for number in numbers[self.start :]:
            yield self._deal(steps[number])

    def _plan(self) -> list[int]:
        """Where the steps end in the order, whichever epoch's."""
        lengths = np.resize(self.num_tokens, self._total)
        if self.shuffle:
            # Whatever an epoch adds, repeats and leaves out, its lengths in order are, one by one, at most these: as if
            # it added the most, repeated the longest, and left out the shortest.
            pairs = len(self.num_tokens)
            places = np.minimum(np.arange(self._total) + max(0, pairs - self._total), pairs - 1)
            lengths = np.sort(self._lengthened(1.0))[places]
        # A rank gets one pair from each row of the sorted step, so no more tokens than the rows' maxima together. In
        # any other order these are no less.
        rows = lengths.reshape(-1, self.num_replicas).max(axis=1)
        ends = self._fill(rows)
        if self.shuffle:
            # As many steps, but even ones: each ends near its share of all tokens, yet not before the steps that are
            # left could hold the rest.
            sums, steps, rest = np.append(0, np.cumsum(rows)), len(ends), [0, *self._fill(rows[::-1])]
            ends = [0]
            for step in range(1, steps + 1):
                even = np.searchsorted(sums, sums[-1] * step / steps)
                ends.append(int(np.clip(even, len(rows) - rest[steps - step], self._farthest(sums, ends[-1]))))
            ends = ends[1:]
        return [end * self.num_replicas for end in ends]

    def _lengthened(self, share: np.ndarray | float) -> np.ndarray:
        """The lengths with `share` of the 1/32 added."""
        return np.minimum(self.num_tokens * (1 + share / 32), self.tokens_per_batch)

    def _fill(self, rows: np.ndarray) -> list[int]:
        """The ends of the fewest steps that hold all rows."""
        sums, ends = np.append(0, np.cumsum(rows)), [0]
        while ends[-1] < len(rows):
            ends.append(self._farthest(sums, ends[-1]))
        return ends[1:]

    def _farthest(self, sums: np.ndarray, start: int) -> int:
        """Where a step that starts at this row ends at the latest."""
        fit = int(np.searchsorted(sums, sums[start] + self.tokens_per_batch, side="right")) - 1
        return min(fit, start + (self.batch_size or fit))

    def _deal(self, step: np.ndarray) -> list[int]:
        """This rank's pairs of a step: one from each row of the step sorted by length, going back and forth."""
        places = np.argsort(self.num_tokens[step], kind="stable").reshape(-1, self.num_replicas)
        places[1::2] = places[1::2, ::-1]
        return step[np.sort(places[:, self.rank])].tolist()
