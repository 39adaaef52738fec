"""The row kernels of csrc/cpu for arm64: compiled here, run by qemu, and compared with float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.arm64.conftest import QEMU
from tests.cuda.comparing import PAIRS, moved, random_case, run_and_check, softcapped_cases
from tests.cuda.emulator import Layout, TokenCase
from tests.cuda.test_support import PLACES, VALUES, assert_as_specified, rows_of
from tests.processes import run_program

pytestmark = pytest.mark.long

SPLIT = 16384  # kSplit of csrc/cpu/rows.h
# Around a pair of vectors of float64 (4 entries) and of float32 (8), a block (256), and splits.
VOCABULARIES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 255, 256, 257, 531, 1030, SPLIT, 2 * SPLIT + 5]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_values_and_gradients(pair, row_kernels):
    run_and_check(row_kernels, [random_case(3, vocabulary, pair, seed=vocabulary) for vocabulary in VOCABULARIES])


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "bf16"), ("f16", "bf16"), ("f64", "f64")], ids="-".join)
def test_softcaps(pair, row_kernels):
    run_and_check(row_kernels, softcapped_cases(pair))


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "bf16"), ("f16", "bf16"), ("f64", "f64")], ids="-".join)
def test_some_gradients(pair, row_kernels):
    """The gradient of the log-probabilities alone, of one side, and over the logits."""
    cases = []
    for vocabulary in (1, 7, 531, SPLIT + 9):
        for grads in (("apart", "apart"), ("none", "apart"), ("apart", "none"), ("in place", "in place")):
            case = random_case(2, vocabulary, pair, seed=vocabulary, grads=grads)
            cases.append(case)
            logprobs = case.upstream[:2] + [None] * 7
            cases.append(random_case(2, vocabulary, pair, seed=vocabulary, grads=grads, upstream=logprobs))
    run_and_check(row_kernels, cases)


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "f16"), ("f64", "f64")], ids="-".join)
def test_the_same_bits_for_the_same_row(pair, row_kernels):
    """They do not depend on where the row begins, on its neighbours, or on which of these are ignored."""
    for vocabulary in (9, 531, SPLIT + 9):
        case = random_case(5, vocabulary, pair, seed=vocabulary)
        case.labels[[1, 3]] = case.ignore_index
        elsewhere = [moved(replace(case), 1, 2, gap=3), moved(replace(case), 3, 1, gap=1)]
        rows = torch.tensor([4, 2, 0])
        upstream = [u[rows] for u in case.upstream]
        alone = TokenCase(case.policy[rows], case.reference[rows], case.labels[rows], upstream=upstream)
        first, *others, of_alone = run_and_check(row_kernels, [case, *elsewhere, alone])
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert torch.equal(first.statistics[:, rows], of_alone.statistics)
        for grad, of_row in zip(first[1:], of_alone[1:], strict=True):
            assert torch.equal(grad[rows], of_row)


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "f16"), ("f64", "f64")], ids="-".join)
@pytest.mark.parametrize("place", PLACES)
def test_infinities(place, pair, row_kernels):
    """NaN, infinities and masks, by the rules of lit_did/ops/reference.py, which runs in float64."""
    vocabulary, entries = PLACES[place]
    values = VALUES if vocabulary < SPLIT else VALUES[:8]
    policy, reference, labels, _ = rows_of(vocabulary, entries, values, pair)
    upstream = list(torch.randn(9, len(labels), generator=torch.Generator().manual_seed(4)))
    case = TokenCase(policy, reference, labels, upstream=upstream, layouts=(Layout(0), Layout(1)))
    (result,) = row_kernels.run([case])
    assert_as_specified(case, result)


def test_exp2(build):
    """tests/ops/test_exp2.py, for arm64: multiplications and additions are fused there."""
    program = build("tests/ops/exp2_error.cpp")
    normal, subnormal, special = map(float, run_program(QEMU, program).split())
    assert 1e-8 < normal <= 1.72e-7
    assert subnormal <= 1
    assert special == 0
