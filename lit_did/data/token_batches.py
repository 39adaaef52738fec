"""Training batches by a budget of tokens: as many pairs as fit, of similar length, the same number on every rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import BatchSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from lit_did.data.dealing import deal

if TYPE_CHECKING:
    from lit_did.data.mixing import Mixture


class TokenBatchSampler(BatchSampler):
    """Batches of at most `tokens_per_batch` tokens, for `ResumableDataLoader`.

    The order of the pairs is cut into steps, which `lit_did.data.dealing` deals to the ranks: equally many pairs, and
    nearly equally many tokens. If the number of pairs is not divisible by the number of ranks, the first pairs of the
    order are repeated, or with `drop_last` the last ones left out. A step has few long pairs or many short ones, so a
    long pair weighs more in a mean over a step.

    With shuffling, an epoch sorts the pairs by length, after it added up to 1/32 to each length at random. It cuts that
    order into steps of nearly equal tokens, and orders the steps at random. So a batch has pairs of similar length; in
    a small data set, often the same ones. Every epoch has the same number of steps with the same numbers of pairs,
    because Lightning reads the length of a loader once and learning rate schedules rely on it. Without shuffling, a
    step takes as many pairs as fit, in the order of the source.

    Args:
        sampler: A DistributedSampler, whose `shuffle`, `seed`, `drop_last` and `epoch` make the order, and the
            `mixture` if it is a MixtureSampler. It is not iterated. Any other sampler, such as the SequentialSampler of
            Lightning's `overfit_batches`, means the order of the source.
        num_tokens: [pairs] The tokens of each pair.
        tokens_per_batch: The most tokens of a batch.
        batch_size: The most pairs of a batch; None for no limit.
        num_replicas: The number of ranks.
        rank: The number of this rank, from 0.

    Attributes:
        start: The number of batches that the next iteration leaves out.

    Raises:
        ValueError: If a pair has more than `tokens_per_batch` tokens.

    Example:
        >>> list(TokenBatchSampler(range(5), num_tokens=[40, 30, 50, 20, 60], tokens_per_batch=100))
        [[0, 1], [2, 3], [4]]
    """

    sampler: DistributedSampler
    batch_size: int | None  # type: ignore[assignment]

    def __init__(
        self,
        sampler: Sampler | Sequence[int],
        num_tokens: np.ndarray | Sequence[int],
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
        if not isinstance(sampler, DistributedSampler):  # on several ranks, Lightning would try to replace it again
            pairs: Any = self.num_tokens  # only their number is used
            sampler = DistributedSampler(pairs, num_replicas, rank, shuffle=False)
        self.sampler, self.tokens_per_batch, self.batch_size = sampler, tokens_per_batch, batch_size
        self.num_replicas, self.rank = num_replicas, rank
        self.shuffle, self.seed, self.drop_last = sampler.shuffle, sampler.seed, sampler.drop_last
        self.mixture: Mixture | None = getattr(sampler, "mixture", None)
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
            chosen = None if self.mixture is None else self.mixture.positions(self.sampler.epoch, self.seed)
            lengths = self._lengthened(generator.random(len(self.num_tokens)), chosen)
            order = order[np.argsort(lengths[order], kind="stable")]
            order = order if chosen is None else chosen[order]
            numbers = generator.permutation(numbers)
        steps = np.split(order, self._ends[:-1])
        for number in numbers[self.start :]:
            step = steps[number]
            yield step[deal(self.num_tokens[step], self.num_replicas, self.rank)].tolist()

    def _plan(self) -> list[int]:
        """The places in the order where the steps end, the same in every epoch."""
        lengths = np.resize(self.num_tokens, self._total)
        if self.shuffle:
            # An epoch adds to lengths, repeats and leaves out pairs at random. The sorted lengths of any epoch are at
            # most these: all lengths extended the most, the longest pairs repeated, the shortest left out.
            pairs = len(self.num_tokens)
            places = np.minimum(np.arange(self._total) + max(0, pairs - self._total), pairs - 1)
            chosen = None if self.mixture is None else self.mixture.longest()
            lengths = np.sort(self._lengthened(1.0, chosen))[places]
        # A rank gets one pair from each row of the sorted step, so at most the sum of the rows' maxima. In any other
        # order this sum is not smaller.
        rows = lengths.reshape(-1, self.num_replicas).max(axis=1)
        ends = self._fill(rows)
        if self.shuffle:
            # The same number of steps, but even ones. Each ends near its share of all tokens, but so that the steps
            # left can hold the rest.
            total, steps, rest = np.append(0, np.cumsum(rows)), len(ends), [0, *self._fill(rows[::-1])]
            even = np.searchsorted(total, total[-1] * np.arange(1, steps + 1) / steps).tolist()
            sums, ends = total.tolist(), [0]
            for step in range(1, steps + 1):
                least, most = len(rows) - rest[steps - step], self._farthest(sums, ends[-1])
                ends.append(min(max(even[step - 1], least), most))
            ends = ends[1:]
        return [end * self.num_replicas for end in ends]

    def _lengthened(self, share: np.ndarray | float, chosen: np.ndarray | None) -> np.ndarray:
        """The lengths of the chosen pairs (None: of all), extended by `share` of 1/32."""
        lengths = self.num_tokens if chosen is None else self.num_tokens[chosen]
        return np.minimum(lengths * (1 + share / 32), self.tokens_per_batch)

    def _fill(self, rows: np.ndarray) -> list[int]:
        """The ends of the fewest steps that hold all rows."""
        sums, ends = np.append(0, np.cumsum(rows)).tolist(), [0]
        while ends[-1] < len(rows):
            ends.append(self._farthest(sums, ends[-1]))
        return ends[1:]

    def _farthest(self, sums: list[float], start: int) -> int:
        """The latest end of a step that starts at this row."""
        fit = bisect_right(sums, sums[start] + self.tokens_per_batch) - 1
        return min(fit, start + (self.batch_size or fit))
