"""Samplers on one and more ranks, and the loader's state without a Trainer."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from lit_did.data.loading import EvaluationSampler, ResumableDataLoader, ResumableSampler
from lit_did.data.token_batches import TokenBatchSampler

ROWS = list(range(11))
LENGTHS = np.arange(10, 21)
BY_TOKENS = {"tokens": 40, "lengths": LENGTHS}  # 6 batches, as of 2 rows each without


def _loader(
    rows=ROWS, num_replicas=1, rank=0, shuffle=True, seed=5, tokens=None, lengths=None, **kwargs
) -> ResumableDataLoader:
    """Batches of 2 rows; or with `tokens`, of at most that many tokens."""
    drop_last = {"drop_last": kwargs.pop("drop_last", False)} if tokens else {}
    sampler = ResumableSampler(rows, num_replicas, rank, shuffle=shuffle, seed=seed, **drop_last)
    if tokens:
        limits = (tokens, kwargs.pop("batch_size", None))
        batch_sampler = TokenBatchSampler(sampler, lengths[: len(rows)], *limits, num_replicas, rank)
        return ResumableDataLoader(rows, batch_sampler=batch_sampler, **kwargs)
    return ResumableDataLoader(rows, **{"batch_size": 2, "sampler": sampler, **kwargs})


def _epoch(loader: ResumableDataLoader, epoch: int) -> list[list[int]]:
    loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("by", [{}, BY_TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_is_a_function_of_seed_and_epoch(by, num_workers):
    first = _epoch(_loader(num_workers=num_workers, **by), 0)
    assert sorted(chain(*first)) == ROWS
    assert _epoch(_loader(**by), 0) == first
    assert _epoch(_loader(**by), 1) != first != _epoch(_loader(seed=6, **by), 0)
    assert list(chain(*_epoch(_loader(shuffle=False, **by), 3))) == ROWS


@pytest.mark.parametrize("by", [{}, BY_TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_state_continues_the_epoch(by, num_workers, done):
    loader = _loader(num_workers=num_workers, **by)
    whole = _epoch(loader, 2)
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    assert [next(iterator).tolist() for _ in range(done)] == whole[:done]
    state = loader.state_dict()
    if done:  # workers have fetched more by now, which does not count
        assert (state["epoch"], state["batches"]) == (2, done)

    resumed = _loader(num_workers=num_workers, **by)
    resumed.load_state_dict(json.loads(json.dumps(state)))  # plain numbers only
    if done:
        assert resumed.state_dict() == state  # saved again before the first batch
    iterator = iter(resumed)
    resumed.sampler.set_epoch(2)  # after iter(), as the Trainer does
    assert [batch.tolist() for batch in iterator] == whole[done:]
    assert resumed.state_dict()["batches"] == len(resumed) == 6
    assert _epoch(resumed, 2) == whole  # the state is used up
    assert _epoch(resumed, 3) == _epoch(_loader(**by), 3)


def test_state_of_a_finished_epoch_does_not_shorten_the_next():
    loader = _loader()
    whole = _epoch(loader, 0)
    for epoch in (0, 1):
        resumed = _loader()
        resumed.load_state_dict(loader.state_dict())
        assert _epoch(resumed, epoch) == (whole if epoch == 0 else _epoch(_loader(), 1))


def test_epoch_that_the_trainer_counts_twice_is_counted_once():
    loader = _loader()
    _epoch(loader, 0)
    resumed = _loader()
    resumed.load_state_dict(loader.state_dict())
    assert _epoch(resumed, 2) == _epoch(_loader(), 1)
    resumed.sampler.set_epoch(3)
    iterator = iter(resumed)
    head = [next(iterator).tolist() for _ in range(2)]
    again = _loader()  # the correction is part of the state
    again.load_state_dict(resumed.state_dict())
    assert head + _epoch(again, 3) == _epoch(_loader(), 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, r"batch_size \* num_replicas=2 \(now 3\)"),
        ({"seed": 6}, r"seed=5 \(now 6\)"),
        ({"num_replicas": 2}, r"batch_size \* num_replicas=2 \(now 4\)"),
        ({"shuffle": False}, r"shuffle=True \(now False\)"),
        ({"drop_last": True}, r"drop_last=False \(now True\)"),
        ({"rows": ROWS[:10]}, r"rows=11 \(now 10\)"),
    ],
)
def test_resuming_another_order_is_an_error(change, named):
    loader = _loader()
    next(iter(loader))
    resumed = _loader(**change)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=f"resume epoch 0 after batch 1 .* these changed: {named}\\."):
        next(iter(resumed))
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(1)
    next(iter(resumed))  # from the next epoch on, everything may change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": 41}, r"tokens_per_batch=40 \(now 41\)"),
        ({"batch_size": 3}, r"batch_size=None \(now 3\)"),
        ({"seed": 6}, r"seed=5 \(now 6\)"),
        ({"num_replicas": 2}, r"num_replicas=1 \(now 2\)"),
        ({"shuffle": False}, r"shuffle=True \(now False\)"),
        ({"drop_last": True}, r"drop_last=False \(now True\)"),
        ({"lengths": np.flip(LENGTHS)}, r"lengths_checksum=\d+ \(now \d+\)"),
        ({"tokens": None}, r"tokens_per_batch=40 \(now None\), lengths_checksum=.*, batch_size \* num_replicas=.*"),
    ],
)
def test_resuming_another_order_by_tokens_is_an_error(change, named):
    loader = _loader(**BY_TOKENS)
    next(iter(loader))
    resumed = _loader(**{**BY_TOKENS, **change})
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=f"resume epoch 0 after batch 1 .* these changed: {named}\\."):
        next(iter(resumed))


@pytest.mark.parametrize("layouts", [(1, 2), (2, 1), (2, 4)])
def test_resuming_on_another_number_of_ranks_leaves_no_pair_out(layouts):
    rows, done = list(range(23)), 2
    before, after = ([_loader(rows, n, rank, batch_size=4 // n) for rank in range(n)] for n in layouts)
    seen = [next(iterator).tolist() for iterator in map(iter, before) for _ in range(done)]
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
        seen += [batch.tolist() for batch in loader]
    counts = Counter(chain(*seen))
    assert sorted(counts) == rows
    assert counts.total() - len(rows) == -len(rows) % layouts[1]  # a few fill up the last batch


def test_other_samplers_are_resumed_too():
    # The Trainer puts in a SequentialSampler for `overfit_batches`.
    loader = ResumableDataLoader(ROWS, batch_size=2)
    iterator = iter(loader)
    head = [next(iterator).tolist() for _ in range(2)]
    resumed = ResumableDataLoader(ROWS, batch_size=2)
    resumed.load_state_dict(loader.state_dict())
    assert list(chain(*head, *(batch.tolist() for batch in resumed))) == ROWS


@pytest.mark.parametrize("done", [0, 2])
def test_two_training_ranks_share_the_epoch(done):
    ranks = []
    for rank in range(2):
        loader = _loader(num_replicas=2, rank=rank)
        iterator = iter(loader)
        head = [next(iterator).tolist() for _ in range(done)]
        resumed = _loader(num_replicas=2, rank=rank)
        if done:
            resumed.load_state_dict(loader.state_dict())
        ranks.append(head + [batch.tolist() for batch in resumed])
    assert [len(batch) for batch in ranks[0]] == [len(batch) for batch in ranks[1]] == [2, 2, 2]
    seen = [*chain(*ranks[0], *ranks[1])]
    assert sorted(set(seen)) == ROWS
    assert len(seen) == 12


@pytest.mark.parametrize(("rows", "replicas"), [(11, 2), (12, 2), (7, 3), (8, 3), (1, 4), (5, 1)])
def test_evaluation_deals_every_row_once(rows, replicas):
    positions = [list(EvaluationSampler(range(rows), replicas, rank)) for rank in range(replicas)]
    lengths = {len(EvaluationSampler(range(rows), replicas, rank)) for rank in range(replicas)}
    assert lengths == {len(rank) for rank in positions} == {-(-rows // replicas)}
    flat = [rank[step] for step in range(lengths.pop()) for rank in positions]
    assert flat == list(range(len(flat)))  # in order across the ranks; past the end: positions of weight 0


def test_samplers_are_distributed_so_that_the_trainer_keeps_them():
    for sampler in (ResumableSampler(ROWS, 1, 0), EvaluationSampler(ROWS, 1, 0)):
        assert isinstance(sampler, torch.utils.data.distributed.DistributedSampler)
    assert isinstance(_loader(**BY_TOKENS).sampler, ResumableSampler)
