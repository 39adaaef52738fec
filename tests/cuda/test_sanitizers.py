"""The CUDA kernels under ThreadSanitizer, which must find no race, and AddressSanitizer with UBSan: no access beside a
row's memory or in rows that are ignored, none of 16 bytes off a 16-byte boundary. test_broken_copies.py sees them fail.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda.comparing import PAIRS, SPLIT, among_many, moved, random_case, run_and_check
from tests.cuda.emulator import SequenceCase


def sequence_cases():
    generator = torch.Generator().manual_seed(0)
    statistics, labels = torch.randn(9, 170, generator=generator), torch.ones(170, dtype=torch.int64)
    return [
        SequenceCase(statistics, labels, torch.tensor([0, 0, 140, 170])),
        SequenceCase(statistics.double(), labels, length=85),
        SequenceCase(statistics, labels, torch.tensor([-1, 140, 2**40])),
    ]


@pytest.mark.long
def test_no_race(build):
    """Each kernel once, with a host thread for every thread of a block: seconds a row."""
    emulator = build("thread")
    two_splits = moved(random_case(1, SPLIT + 9, ("bf16", "f32"), grads=("in place", "apart")), 1, 3)
    ignored = random_case(2, 777, ("f32", "f32"), grads=("in place", "in place"))
    ignored.labels[1] = -100
    # Each side's words around a chunk hold entries that other threads write.
    both = moved(random_case(1, 1000, ("f32", "f32"), grads=("in place", "in place")), 1, 3)
    logprobs = moved(random_case(1, 1000, ("bf16", "bf16"), grads=("in place", "in place")), 3, 2)
    logprobs.upstream[2:] = [None] * 7
    run_and_check(emulator, [two_splits, ignored, both, logprobs, random_case(1, 70, ("f64", "f64"))])
    run_and_check(emulator, [among_many(random_case(1, 1000))])  # blocks that finish their row
    emulator.run(sequence_cases()[:1])


def places(pair, offsets):
    """Rows with other memory, or none, close by on both sides, in every dtype's tails, apart and in place."""
    cases = []
    for by in offsets:
        for size, grads in ((1, "apart"), (9, "in place"), (131, "apart"), (1024, "apart"), (2061, "in place")):
            case = moved(random_case(1, size, pair, by, grads=(grads, grads)), by, (5 * by + size) % 8)
            case.upstream = [u if size != 131 or i < 2 else None for i, u in enumerate(case.upstream)]
            cases.append(case)
    ignored = random_case(3, 130, pair)
    ignored.labels[:2] = -100
    beyond = random_case(2, 33, pair)
    beyond.labels[0] = 33
    many = among_many(random_case(1, 1100, pair))
    return [*cases, moved(ignored, 1, 2, gap=16), many], beyond


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_access_outside(pair, build):
    emulator = build("address")
    cases, beyond = places(pair, (0, 1, 4))
    run_and_check(emulator, cases)
    assert emulator.run([beyond])[0].statistics[:2, 0].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_access_outside_at_any_address(pair, build):
    emulator = build("address")
    cases, _ = places(pair, range(8))
    long = [moved(random_case(2, size, pair), by, 3 * by % 8) for by in range(8) for size in (SPLIT - 1, SPLIT + 5)]
    run_and_check(emulator, cases + long)


def test_no_access_outside_sequences(build):
    build("address").run(sequence_cases())
