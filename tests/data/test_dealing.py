"""Equal work: the pairs of a step are dealt to the data-parallel ranks by their tokens."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_did.data import PreferenceDataModule
from lit_did.data.dealing import deal
from lit_did.data.loading import ResumableSampler

LENGTHS = np.random.default_rng(0).lognormal(5.5, 0.8, 997).astype(int)  # as those of text


def _steps(ranks: int, batch_size: int, *, dealt: bool = True, **options) -> list[list[list[int]]]:
    """[step][rank][pair]"""
    of_ranks = []
    for rank in range(ranks):
        tokens = {"num_tokens": LENGTHS} if dealt else {}
        sampler = ResumableSampler(LENGTHS, ranks, rank, seed=3, batch_size=batch_size, **tokens, **options)
        rows = list(sampler)
        assert len(rows) == len(sampler)
        of_ranks.append([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])
    return list(zip(*of_ranks, strict=True))


def _spread(step: list[list[int]]) -> int:
    return np.ptp([LENGTHS[batch].sum() for batch in step])


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"shuffle": False}])
def test_ranks_get_equal_work_and_each_pair_once(ranks, options):
    steps = _steps(ranks, 8, **options)
    for step in steps:
        assert len({len(batch) for batch in step}) == 1
        lengths = np.sort(LENGTHS[[*chain(*step)]])
        assert _spread(step) <= np.ptp(lengths.reshape(-1, ranks), axis=1).max()
    counts = Counter(chain(*chain(*steps)))
    missing = 997 % ranks if options.get("drop_last") else 0
    assert len(counts) == 997 - missing
    assert counts.total() == 997 - missing if options.get("drop_last") else -(-997 // ranks) * ranks


def test_work_is_far_nearer_than_in_turn():
    by_tokens, in_turn = (np.median([_spread(step) for step in _steps(8, 8, dealt=d)]) for d in (True, False))
    assert by_tokens < in_turn / 4


def test_the_pairs_of_a_step_do_not_depend_on_the_ranks():
    one, four = ([sorted(chain(*step)) for step in _steps(n, 16 // n)] for n in (1, 4))
    assert one[:-1] == four[:-1]
    assert {*one[-1]} <= {*four[-1]}  # whose first pairs are repeated


def test_planted_lengths():
    lengths = np.array([100, 1, 1, 1, 50, 50, 1, 2])
    of_ranks = [deal(lengths, 2, rank).tolist() for rank in (0, 1)]
    assert sorted(chain(*of_ranks)) == list(range(8))
    assert [lengths[places].sum() for places in of_ranks] == [104, 102]


@pytest.mark.parametrize("by", [{"batch_size": 2}, {"tokens_per_batch": 16, "max_length": 6}], ids=["pairs", "tokens"])
def test_the_processes_of_a_tensor_parallel_group_get_the_same_pairs(no_specials, by):
    rows = [{"prompt": "a", "chosen": " b" * (n % 5 + 1), "rejected": " c"} for n in range(12)]
    seen = []
    for process in range(4):
        dist.init_process_group("fake", rank=process, world_size=4, store=FakeStore())
        try:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
            names = ("data_parallel", "tensor_parallel")
            strategy._device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
            data = PreferenceDataModule(rows, no_specials, **by)
            data.trainer = SimpleNamespace(
                distributed_sampler_kwargs=strategy.distributed_sampler_kwargs, progress_bar_callback=None
            )
            data.setup("fit")
            seen.append([batch["index"].tolist() for batch in data.train_dataloader()])
        finally:
            dist.destroy_process_group()
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert sorted(chain(*seen[0], *seen[2])) == list(range(12))
    tokens = [[sum(4 + row % 5 for row in batch) for batch in rank] for rank in seen[::2]]
    assert all(abs(one - other) <= 4 for one, other in zip(*tokens, strict=True))
