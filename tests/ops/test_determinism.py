"""The same row gives the same bits: alone or in a batch, at any address, with any number of threads, every time."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lit_did import sequence_statistics, token_statistics
from tests.helpers import DTYPES, random_logits
from tests.processes import run_program

SPLIT = 16384
# Below a vector; vectors, a block and a tail; three splits, which threads share when rows are few.
VOCABULARIES = [7, 530, 2 * SPLIT + 21]


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(policy, reference, labels):
    """The statistics [9, rows] and both gradients, as bits."""
    inputs = (policy.detach().requires_grad_(), reference.detach().requires_grad_())
    statistics = token_statistics(*inputs, labels, backend="fused")
    return torch.stack(statistics).detach(), *torch.autograd.grad([s.sum() for s in statistics], inputs)


def same(result, expected, rows=slice(None)):
    values, *grads = result
    expected_values, *expected_grads = expected
    return torch.equal(values, expected_values[:, rows]) and all(
        torch.equal(grad, of_expected[rows]) for grad, of_expected in zip(grads, expected_grads, strict=True)
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_threads(vocabulary, dtype):
    """12 rows are 4 and more a thread: with one thread and two rows are shared, with eight a row's splits are."""
    batch = random_logits(12, vocabulary, DTYPES[dtype], DTYPES[dtype])
    with threads(1):
        expected = call(*batch)
    for number in (1, 2, 8):
        with threads(number):
            assert same(call(*batch), expected), f"{number} threads"
            assert same(call(*batch), expected), f"{number} threads, again"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the threads' times from Linux's /proc")
def test_the_threads_work():
    """Forward and backward run on both of torch's two threads, in rows when they are many and in parts when few."""
    code = """
import sys, time, torch
from pathlib import Path
from tests.helpers import random_logits
from tests.ops.test_determinism import call

torch.set_num_threads(2)
batch = random_logits(int(sys.argv[1]), 100_000, torch.float32, torch.float32)

def ticks():  # of processor time, of each thread
    stats = [path.read_text().rsplit(")")[-1].split() for path in Path("/proc/self/task").glob("*/stat")]
    return sorted(int(stat[11]) + int(stat[12]) for stat in stats)

before, begin = sum(ticks()[:-1]), time.monotonic()
while sum(ticks()[:-1]) < before + 5 and time.monotonic() < begin + 60:  # all threads but the busiest
    call(*batch)
print(sum(ticks()[:-1]) - before)
"""
    for rows in (1, 12):
        assert int(run_program(sys.executable, "-c", code, rows)) >= 5, (
            f"{rows} rows: the second thread did next to nothing"
        )


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_alone_or_in_a_batch(vocabulary, dtype, number):
    batch = random_logits(12, vocabulary, DTYPES[dtype], DTYPES[dtype])
    with threads(number):
        expected = call(*batch)
        for row in (0, 5, 11):
            alone = slice(row, row + 1)
            assert same(call(*(x[alone].clone() for x in batch)), expected, alone)
        backwards = torch.arange(11, -1, -1)
        assert same(call(*(x[backwards] for x in batch)), expected, backwards)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("vocabulary", [530, 2 * SPLIT + 21])
def test_few_rows(vocabulary, dtype):
    """1 to 8 rows, whose splits are shared, forward and backward, against 40 rows, which are not."""
    batch = random_logits(40, vocabulary, DTYPES[dtype], DTYPES[dtype])
    with threads(1):
        expected = call(*batch)
    for number in (1, 2, 8):
        with threads(number):
            for rows in (1, 2, 3, 5, 8):
                few = slice(7, 7 + rows)
                assert same(call(*(x[few] for x in batch)), expected, few), f"{rows} rows, {number} threads"


@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("rows", [10, 40])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_ignored_rows(dtype, rows, number):
    """Which rows are ignored, and where they lie, decides who computes the others but not what comes out."""
    policy, reference, labels = random_logits(rows, SPLIT + 21, DTYPES[dtype], DTYPES[dtype])
    with threads(1):
        values, *grads = call(policy, reference, labels)
    for kept in (torch.arange(rows) >= rows // 2, torch.arange(rows) % 2 == 0, torch.arange(rows) == rows - 1):
        with threads(number):
            result = call(policy, reference, labels.masked_fill(~kept, -100))
        assert same(result, (values * kept, *(grad.masked_fill(~kept[:, None], 0) for grad in grads))), (
            f"{int(kept.sum())} of {rows} rows kept"
        )


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_any_address(vocabulary, dtype):
    """Rows that begin 0 to 3 entries after a 64-byte boundary, on either side."""
    policy, reference, labels = random_logits(2, vocabulary, DTYPES[dtype], DTYPES[dtype])
    expected = call(policy, reference, labels)

    def moved(logits, by):
        memory = torch.full((2, vocabulary + 64), torch.nan, dtype=logits.dtype)
        memory[:, by : by + vocabulary] = logits
        return memory[:, by : by + vocabulary]

    for by in range(1, 4):
        assert same(call(moved(policy, by), reference, labels), expected)
        assert same(call(moved(policy, 3 - by), moved(reference, by), labels), expected)


@pytest.mark.parametrize("entries", ["infinite", "far below"])
def test_with_holes(entries):
    """Blocks with infinities take another path, as do those after logits that are far below the largest. Which one
    depends on the row alone."""
    policy, reference, labels = random_logits(12, 2 * SPLIT + 21, torch.float32, torch.float32)
    labels[:] = 0
    if entries == "infinite":
        policy[::2, 5::7], reference[::2, 5::7] = -torch.inf, -torch.inf
    else:
        policy[::2, 5000::9000] -= 120
    with threads(1):
        expected = call(policy, reference, labels)
        assert same(call(policy[2:3], reference[2:3], labels[2:3]), expected, slice(2, 3))
    with threads(8):
        assert same(call(policy, reference, labels), expected)


@pytest.mark.parametrize("vocabulary", [SPLIT, SPLIT + 1])
def test_large_gradients(vocabulary):
    """Beyond 32 MiB a gradient goes past the caches where its rows are aligned: the same bits as in small batches."""
    policy, reference, labels = random_logits(8, vocabulary, torch.float32, torch.float32)
    labels[1:3], policy[4, 7] = -100, torch.nan
    expected = [x.nan_to_num(7.0) for x in call(policy, reference, labels)]
    large = call(*(x.repeat(65, *[1] * (x.dim() - 1)) for x in (policy, reference, labels)))
    assert large[1].nbytes > 2**25 > expected[1].nbytes
    for first in range(0, 520, 8):
        rows = slice(first, first + 8)
        assert all(torch.equal(a[rows].nan_to_num(7.0), b) for a, b in zip(large[1:], expected[1:], strict=True))


def test_sequences():
    """Sums over tokens too, in both layouts."""
    policy, reference, labels = random_logits(24, 530, torch.float32, torch.float32)
    offsets = torch.tensor([0, 5, 5, 24])
    results = []
    for number in (1, 2, 8):
        with threads(number):
            packed = sequence_statistics(policy, reference, labels, cu_seqlens=offsets)
            padded = sequence_statistics(policy.view(3, 8, -1), reference.view(3, 8, -1), labels.view(3, 8))
        results.append([*packed, *padded])
    for result in results[1:]:
        assert all(torch.equal(ours, expected) for ours, expected in zip(result, results[0], strict=True))
