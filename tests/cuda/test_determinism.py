"""The CUDA kernels give a row the same bits: at any address, alone or in a batch, in whatever order threads run."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.cuda.comparing import PAIRS, PART, SPLIT, among_many, constant, moved, random_case
from tests.cuda.emulator import TokenCase

OFTEN = [("f32", "f32"), ("bf16", "bf16"), ("f32", "bf16"), ("f64", "f64")]
RARELY = [pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS if pair not in OFTEN]


def same(ours, expected, rows=slice(None)):
    return torch.equal(ours.statistics, expected.statistics[:, rows]) and all(
        torch.equal(grad, of_expected[rows]) for grad, of_expected in zip(ours[1:], expected[1:], strict=True)
    )


@pytest.mark.parametrize("pair", OFTEN + RARELY, ids="-".join)
def test_any_address(pair, emulator):
    """Rows that begin 0 to 7 entries after a boundary, on each side apart, and gradients that begin elsewhere still."""
    case = random_case(1, 2061, pair)
    everywhere = [moved(copy.copy(case), policy, reference) for policy in range(8) for reference in range(8)]
    expected, *results = emulator.run([case, *everywhere])
    for place, result in zip(everywhere, results, strict=True):
        assert same(result, expected), place.layouts


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "bf16"), ("f16", "f32"), ("f64", "f64")], ids="-".join)
@pytest.mark.parametrize("vocabulary", [7, 1001, SPLIT + 21])
def test_alone_or_in_a_batch(vocabulary, pair, emulator):
    """In a batch of odd rows each begins elsewhere."""
    batch = random_case(5, vocabulary, pair)
    backwards = TokenCase(*(x.flip(0) for x in (batch.policy, batch.reference, batch.labels)))
    backwards.upstream = [u.flip(0) for u in batch.upstream]
    alone = []
    for row in range(5):
        rows = slice(row, row + 1)
        logits = (x[rows] for x in (batch.policy, batch.reference, batch.labels))
        alone.append(TokenCase(*logits, upstream=[u[rows] for u in batch.upstream]))
    expected, in_reverse, *results = emulator.run([batch, backwards, *alone])
    assert same(in_reverse, expected, [4, 3, 2, 1, 0])
    for row, result in enumerate(results):
        assert same(result, expected, slice(row, row + 1)), row


@pytest.mark.parametrize("parts", [1, 3, 6])
@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("f32", "bf16"), ("f64", "f64")], ids="-".join)
def test_any_number_of_rows(pair, parts, emulator):
    """Blocks take one part of a row, or several; of a short row all, and finish it."""
    assert 3 <= constant("kernels.h", "kPartsABlock") < 6
    case = random_case(1, parts * PART - 21, pair, upstream=None)
    expected, result = emulator.run([case, among_many(copy.copy(case))])
    assert torch.equal(result.statistics[:, :1], expected.statistics)


@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("f64", "f64")], ids="-".join)
def test_any_order_of_threads_and_blocks(pair, emulator):
    cases = [moved(random_case(3, SPLIT + 21, pair), 1, 2)]
    for seed in range(2, 8):
        cases.append(copy.copy(cases[0]))
        cases[-1].seed = seed
    expected, *results = emulator.run(cases)
    for result in results:
        assert same(result, expected)
