"""Batches by token budget: every promise, recounted from the lengths of the pairs."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
from torch.utils.data import SequentialSampler

from lit_did.data.loading import ResumableSampler
from lit_did.data.token_batches import TokenBatchSampler

BUDGET = 3000
# Log-normal, as lengths of text are; 997 pairs, a prime, so that they divide by no number of ranks.
LENGTHS = np.random.default_rng(0).lognormal(5.5, 0.8, 997).astype(int).clip(4, BUDGET)


def _steps(lengths=LENGTHS, ranks=1, epoch=0, budget=BUDGET, batch_size=None, **kwargs) -> list[list[list[int]]]:
    """[step][rank][pair] of an epoch."""
    batches = []
    for rank in range(ranks):
        sampler = ResumableSampler(lengths, ranks, rank, **{"shuffle": True, "seed": 3, **kwargs})
        sampler.set_epoch(epoch)
        batch_sampler = TokenBatchSampler(sampler, lengths, budget, batch_size, ranks, rank)
        batches.append(list(batch_sampler))
        assert len(batch_sampler) == len(batches[-1])
    return list(zip(*batches, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_budget_and_equal_work(ranks, shuffle, drop_last, batch_size):
    for epoch in range(3):
        steps = _steps(ranks=ranks, shuffle=shuffle, drop_last=drop_last, batch_size=batch_size, epoch=epoch)
        for step in steps:
            assert len({len(batch) for batch in step}) == 1
            assert 1 <= len(step[0]) <= (batch_size or len(LENGTHS))
            tokens = [LENGTHS[batch].sum() for batch in step]
            lengths = LENGTHS[[*chain(*step)]]
            assert max(tokens) <= BUDGET
            assert max(tokens) - min(tokens) <= lengths.max() - lengths.min()
        counts = Counter(chain(*chain(*steps)))
        missing = 997 % ranks if drop_last else 0
        assert len(counts) == 997 - missing
        assert sum(counts.values()) == (997 - missing if drop_last else -(-997 // ranks) * ranks)
        assert max(counts.values()) <= 2


@pytest.mark.parametrize("drop_last", [True, False])
def test_budget_whichever_pairs_are_repeated_or_left_out(drop_last):
    # Few pairs, so that the ones repeated or left out matter, and a budget that is often filled.
    draw = np.random.default_rng(2)
    for _ in range(60):
        lengths = draw.integers(1, 21, 11)
        plans = {epoch: _steps(lengths, ranks=3, drop_last=drop_last, budget=40, epoch=epoch) for epoch in range(5)}
        assert max(lengths[batch].sum() for steps in plans.values() for step in steps for batch in step) <= 40
        assert len({len(steps) for steps in plans.values()}) == 1


def _fewest(lengths: np.ndarray, ranks: int, budget: float) -> int:
    """The steps that the pairs need in order of length, a row of one pair a rank being as long as its longest."""
    steps, taken = 1, 0
    for most in np.sort(lengths)[ranks - 1 :: ranks]:
        steps, taken = (steps + 1, most) if taken + most > budget else (steps, taken + most)
    return steps


@pytest.mark.parametrize("ranks", [1, 3])
def test_shuffled_steps_are_full_and_of_similar_lengths(ranks):
    lengths = LENGTHS[:996]
    steps = _steps(lengths, ranks=ranks)
    # The room that lengths get to vary by is 1/32, so with so much less budget no more steps are needed.
    assert len(steps) <= _fewest(lengths, ranks, BUDGET * 32 / 33)

    def kept(steps) -> float:  # if each pair were padded to the longest of its batch
        return lengths.sum() / sum(lengths[batch].max() * len(batch) for step in steps for batch in step)

    assert kept(steps) > 0.85 > 0.6 > kept(_steps(lengths, ranks=ranks, shuffle=False))


def test_ranks_are_far_nearer_than_the_bound():
    # Short and long ones to each rank: less than half the difference of dealing always in the same direction. Medians,
    # for a step of the few longest pairs is dealt out in one row.
    lengths, gaps, straight = LENGTHS[:996], [], []
    for step in _steps(lengths, ranks=3):
        gaps.append(np.ptp([lengths[batch].sum() for batch in step]))
        straight.append(np.ptp(np.sort(lengths[[*chain(*step)]]).reshape(-1, 3).sum(axis=0)))
    assert np.median(gaps) < np.median(straight) / 2


def test_steps_are_in_random_order_and_mixed_anew_each_epoch():
    epochs = [[step[0] for step in _steps(epoch=epoch)] for epoch in range(4)]
    means = np.array([[LENGTHS[batch].mean() for batch in epoch] for epoch in epochs])
    # In random order, place and length have a correlation of 0 with a standard error of 1 / sqrt(steps).
    correlation = np.corrcoef(np.tile(np.arange(means.shape[1]), 4), means.ravel())[0, 1]
    assert abs(correlation) < 3 / np.sqrt(means.size)
    assert [LENGTHS[batch].sum() for batch in epochs[0]] != [LENGTHS[batch].sum() for batch in epochs[1]]
    partners = [{frozenset(pair) for batch in epoch for pair in combinations(batch, 2)} for epoch in epochs]
    assert 0.2 * len(partners[0]) < len(partners[0] - partners[1]) < 0.8 * len(partners[0])


def test_epochs_have_equally_many_steps_and_pairs():
    sizes = [sorted(len(step[0]) for step in _steps(ranks=2, epoch=epoch)) for epoch in range(20)]
    assert all(size == sizes[0] for size in sizes)


def test_order_is_a_function_of_seed_epoch_and_ranks():
    first = _steps(ranks=2, epoch=1)
    assert _steps(ranks=2, epoch=1) == first
    for change in ({"epoch": 2}, {"seed": 5}, {"ranks": 3}):
        assert _steps(**{"ranks": 2, "epoch": 1, **change}) != first


def test_unshuffled_keeps_the_order_and_takes_as_many_as_fit():
    steps = [step[0] for step in _steps(shuffle=False)]
    assert [*chain(*steps)] == list(range(997))
    for batch, after in pairwise(steps):
        assert LENGTHS[batch].sum() + LENGTHS[after[0]] > BUDGET
    # On several ranks, each step is the next pairs of the source.
    flat = [sorted(chain(*step)) for step in _steps(ranks=3, shuffle=False, drop_last=True)]
    assert [*chain(*flat)] == list(range(996))


def test_steps_are_even():
    # 3 of the 10 pairs fit; a step of the one that is left would weigh it as much as three others.
    assert sorted(len(step[0]) for step in _steps(np.full(10, 100), budget=399)) == [2, 2, 3, 3]
    assert sorted(len(step[0]) for step in _steps(np.full(10, 100), budget=999, batch_size=4)) == [3, 3, 4]


def test_start_leaves_out_batches():
    sampler = TokenBatchSampler(ResumableSampler(LENGTHS, 1, 0, seed=3), LENGTHS, BUDGET)
    whole = list(sampler)
    sampler.start = 5
    assert list(sampler) == whole[5:]
    assert len(sampler) == len(whole)


def test_fewer_pairs_than_ranks():
    lengths = np.array([10, 20])
    assert all(len(rank) == 1 for step in _steps(lengths, ranks=5) for rank in step)
    assert {*chain(*chain(*_steps(lengths, ranks=5)))} == {0, 1}
    assert _steps(lengths, ranks=5, drop_last=True) == []


def test_other_samplers_mean_the_order_of_the_source():
    lengths = [3, 3, 3, 5, 1]
    assert list(TokenBatchSampler(SequentialSampler(lengths), lengths, 6)) == [[0, 1], [2], [3, 4]]
    ranks = [TokenBatchSampler(SequentialSampler(lengths), lengths, 6, None, 2, rank) for rank in range(2)]
    assert [sorted(chain(*step)) for step in zip(*ranks, strict=True)] == [[0, 1], [2, 3], [0, 4]]


def test_longer_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match=r"Expected `tokens_per_batch` to be at least 5, .* longest pair, but got 4"):
        TokenBatchSampler(SequentialSampler([3, 5]), [3, 5], 4)
