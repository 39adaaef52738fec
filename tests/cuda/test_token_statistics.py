"""The CUDA kernels' values and gradients, run on the host, against the formulas: sizes, dtypes, layouts, labels."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from lit_did import token_statistics
from lit_did.ops.extension import EXTENSION
from tests.cuda.comparing import PAIRS, PART, SPLIT, among_many, moved, random_case, run_and_check
from tests.cuda.emulator import Layout, TokenCase
from tests.helpers import FIELDS, random_logits

CHUNK = 8  # entries of 16 bits in a 16-byte word
with_pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
SIZES = {
    1: "nothing but the label",
    2: "the smallest distribution",
    CHUNK - 1: "below one chunk",
    CHUNK: "one chunk",
    CHUNK + 1: "one left over",
    31: "one lane below a warp",
    33: "odd, so that every other row begins elsewhere",
    255: "below a block's threads",
    257: "above them",
    1000: "whole chunks, not all threads",
    4099: "every thread has chunks, and a tail",
}
LONG_SIZES = {
    PART - 1: "below one part",
    PART + 1: "a part of one entry",
    3 * PART + 700: "several parts, the last with whole turns and a tail",
    2 * SPLIT + 5: "several stretches of the backward",
}


@with_pairs
def test_values_and_gradients(pair, emulator):
    """Rows one after another, so that for odd sizes each begins elsewhere, at another place on each side."""
    cases = [moved(random_case(3, size, pair, seed), seed % 8, 3 * seed % 8) for seed, size in enumerate(SIZES)]
    cases += [moved(random_case(1, size, pair, seed), seed, seed * 2) for seed, size in enumerate(LONG_SIZES)]
    run_and_check(emulator, cases)


def test_blocks_that_finish_their_row(emulator):
    """Where rows are many; also with a label out of range."""
    run_and_check(emulator, [among_many(random_case(1, size, ("bf16", "f32"))) for size in (1, 33, 2 * PART + 5)])
    beyond = among_many(random_case(1, 33))
    beyond.labels[0] = 33
    (result,) = emulator.run([beyond])
    assert result.statistics[:2, 0].isnan().all()
    assert result.statistics[2:, 0].isfinite().all()


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32"), ("f64", "f64")], ids="-".join)
def test_temperature(pair, emulator):
    run_and_check(emulator, [random_case(3, 530, pair, temperature=t) for t in (0.6, 2.5)])


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "f16")], ids="-".join)
def test_the_label_wherever_it_lies(pair, emulator):
    """First, at the edges of chunks and of what the threads take at a time, and in the tail of 4,099 entries."""
    places = [0, 7, 8, 2047, 2048, 4095, 4096, 4098]
    case = random_case(len(places), 4099, pair)
    case.labels = torch.tensor(places)
    long = random_case(5, SPLIT + 9, pair)
    long.labels = torch.tensor([PART - 1, PART, SPLIT - 1, SPLIT, SPLIT + 8])
    run_and_check(emulator, [moved(case, 3, 5), moved(long, 1, 0)])


def test_labels_out_of_range(emulator):
    """NaN log-probabilities, for nothing can be raised on a device; the other statistics do not know of labels."""
    case = random_case(6, 37, upstream=None)
    (right,) = emulator.run([case])
    case.labels = torch.tensor([-1, 37, 1000, 2**40, -(2**40), 36])
    (result,) = emulator.run([case])
    assert result.statistics[:2, :5].isnan().all()
    assert torch.equal(result.statistics[2:], right.statistics[2:])
    assert result.statistics[:2, 5].isfinite().all()


@pytest.mark.parametrize("kind", ["all", "log-probabilities", "others"])
def test_gradient_of_labels_out_of_range(kind, emulator):
    """NaN as its log-probabilities are; where those are not used, the label does not count."""
    case = random_case(3, 37)
    used = {"all": range(9), "log-probabilities": range(2), "others": range(2, 9)}[kind]
    case.upstream = [u if i in used else None for i, u in enumerate(case.upstream)]
    case.labels = torch.tensor([37, -1, 5])
    (result,) = emulator.run([case])
    for grad in (result.policy_grad, result.reference_grad):
        assert grad[:2].isnan().all() if kind != "others" else grad[:2].isfinite().all()
        assert grad[2].isfinite().all()


# ----------------------------------------------------------------------------------------------------------
# Inputs that can fail
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_peaked(dtype, emulator):
    """One entry 110 above the rest, on either side or both: e^-110 is below float32."""
    cases = []
    for side, peak in itertools.product(("policy", "reference", "both"), (3, 514, 529)):
        case = random_case(4, 530, (dtype, dtype))
        for name, logits in (("policy", case.policy), ("reference", case.reference)):
            if side in (name, "both"):
                logits[:, peak] = logits.amax(-1) + 110
        case.labels[:2] = peak
        cases.append(case)
    run_and_check(emulator, cases)


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
def test_a_peak_anywhere_in_a_turn(dtype, emulator):
    """The sums of the turn that holds it are thrown away, wherever it lies, and the turn is added again."""
    places = [*range(1040, 1050), 1287, 1288, 1535, 2040]
    case = random_case(len(places), 2100, (dtype, dtype))
    rows = torch.arange(len(places))
    case.policy[rows, places] += 40
    case.reference[rows, torch.tensor(places).flip(0)] += 25
    case.labels = torch.tensor(places)
    run_and_check(emulator, [case, moved(copy.copy(case), 1, 3)])


def test_just_below_what_moves_the_origins(emulator):
    """Weights as far above their origins as they may be: rounding as small as with origins at the maxima."""
    cases = []
    for rise in (2.0, 5.0, 5.4, 5.6):  # 2^8 is e^5.545
        for dtype in ("bf16", "f32"):
            case = random_case(2, 2048, (dtype, dtype))
            case.policy, case.reference = case.policy.clamp(max=0), case.reference.clamp(max=0)
            case.policy[0, 1500], case.reference[0, 1400], case.policy[1, 1500] = rise, rise, rise
            case.reference[1, 1500], case.labels[:] = -10, 1500
            cases.append(case)
    run_and_check(emulator, cases)


def test_rising_logits(emulator):
    """Each turn above the one before it: the origins of the sums move as often as they can."""
    cases = []
    for slope in (0.01, -0.01, 0.3):
        policy, reference, labels = random_logits(2, 4099, torch.float32, torch.float32)
        rise = slope * torch.arange(4099)
        upstream = list(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))
        cases.append(TokenCase(policy + rise, reference - 0.5 * rise, labels, upstream=upstream))
    run_and_check(emulator, cases)


@pytest.mark.parametrize("entries", [[3, 529], [i for i in range(530) if i not in (100, 528)]], ids=["two", "most"])
def test_moderate_mask(entries, emulator):
    """-1e4 is a logit like any other: weight 0 in its model, and 1 in the ratio of two that have it."""
    cases = []
    for policy, reference in [(-1e4, -1e4), (-1e4, None), (None, -1e4)]:
        case = random_case(3, 530)
        case.labels[:] = 528
        for logits, value in ((case.policy, policy), (case.reference, reference)):
            if value is not None:
                logits[:, entries] = value
        cases.append(case)
    run_and_check(emulator, cases)


def test_policy_near_the_reference(emulator):
    """The first steps of training: divergences of step^2 out of terms near 1."""
    cases = []
    for step in (1e-3, 1e-5):
        case = random_case(3, 2050)
        case.policy = case.reference + step * torch.randn(3, 2050, generator=torch.Generator().manual_seed(0))
        cases.append(case)
    run_and_check(emulator, cases)


@pytest.mark.parametrize(("policy_offset", "reference_offset"), [(1e4, 1e4), (-1e4, -1e4), (300, -300)])
def test_large_logits(policy_offset, reference_offset, emulator):
    case = random_case(3, 530)
    case.policy, case.reference = case.policy + policy_offset, case.reference + reference_offset
    run_and_check(emulator, [case])


def test_gradient_of_logits_near_the_limit(emulator):
    """What float32 takes from a normalizer of 1.3e6 would scale the row's gradient by up to 4%."""
    case = random_case(8, 530)
    case.policy, case.reference = case.policy + 9e5, case.reference - 9e5
    case.upstream = [u if i < 2 else None for i, u in enumerate(case.upstream)]
    (result,) = emulator.run([case])
    for i, logits in enumerate((case.policy, case.reference)):
        logits = logits.double().requires_grad_()
        logprobs = logits.log_softmax(-1)[torch.arange(8), case.labels]
        (expected,) = torch.autograd.grad(logprobs, logits, case.upstream[i].double())
        torch.testing.assert_close(result[1 + i].double(), expected, rtol=2e-6, atol=1e-9)


def test_far_apart(emulator):
    case = random_case(8, 530)
    case.policy, case.reference = case.policy * 30, case.reference.flip(-1) * 30
    run_and_check(emulator, [case])


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_origins_seldom_move(dtype, emulator):
    """A warp moves them at the start of a part, and of logits as peaked as language models' seldom again.

    Every further move exchanges three maxima, in five shuffles each, and the turn's vote again. Equal logits move the
    origins at the start alone; rising ones move them in every turn.
    """
    parts = 32
    peaked = random_case(4, parts // 4 * PART, (dtype, dtype), upstream=None)
    assert 2.9 < peaked.policy.float().std() < 3.1
    equal = TokenCase(torch.zeros_like(peaked.policy), torch.zeros_like(peaked.reference), peaked.labels)
    turn = 2 * 32 * 16 // peaked.policy.element_size()
    steps = 8.0 * (torch.arange(PART) // turn).repeat(parts // 4).expand_as(peaked.policy).to(peaked.policy)
    rising = TokenCase(steps, torch.zeros_like(steps), peaked.labels)
    emulator.run([equal, peaked, rising])
    once, often, always = (1 + (n - emulator.exchanges[0]) / (16 * 32 * parts) for n in emulator.exchanges)
    assert (once, always) == (1, PART // turn)
    assert 1 <= often < 1.2


# ----------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------


@with_pairs
@pytest.mark.parametrize("ignore_index", [-100, 3, 2**40])
def test_ignored_rows(ignore_index, pair, emulator):
    """0 and a gradient of 0; their logits are NaN in memory and, under AddressSanitizer, may not be read."""
    case = random_case(6, 130, pair, ignore_index=ignore_index)
    case.labels = case.labels.clamp(min=4)
    case.labels[[1, 2, 5]] = ignore_index
    in_place = random_case(6, 130, pair, ignore_index=ignore_index, grads=("in place", "in place"))
    in_place.labels = case.labels
    run_and_check(emulator, [moved(case, 1, 2), moved(in_place, 1, 2)])


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_do(rows, emulator):
    """No rows, or only ignored ones."""
    case = random_case(rows, 20)
    case.labels[:] = -100
    (result,) = run_and_check(emulator, [case])
    assert result.statistics.shape == (9, rows)
    assert result.policy_grad.shape == (rows, 20)


@pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "f32"), ("f64", "f64")], ids="-".join)
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (1, 2, 3, 2)], ids=str)
def test_shapes_and_strides(shape, pair, emulator):
    """Up to four leading dimensions, with gaps between rows and with the dimensions the other way round in memory."""
    rows = torch.Size(shape).numel()
    cases = []
    for layouts in itertools.product((Layout(0, 3), Layout(1, 2, reversed_dims=True)), repeat=2):
        case = random_case(rows, 37, pair)
        case.policy, case.reference = case.policy.view(*shape, 37), case.reference.view(*shape, 37)
        case.labels = case.labels.view(shape)
        case.upstream = [u.view(shape) for u in case.upstream]
        case.layouts, case.grad_layouts = layouts, (Layout(2, 1), layouts[0])
        cases.append(case)
    results = run_and_check(emulator, cases)
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


# ----------------------------------------------------------------------------------------------------------
# What the loss uses, and which gradients are needed: both decide which kernel runs
# ----------------------------------------------------------------------------------------------------------

USES = [*((i,) for i in range(9)), (0, 1), (0, 1, 2), (2, 7), (5, 6)]


@pytest.mark.parametrize("grads", [("apart", "none"), ("none", "apart"), ("apart", "apart")], ids="-".join)
def test_used_statistics_and_needed_gradients(grads, emulator):
    cases = []
    for used, pair in itertools.product(USES, [("f32", "f32"), ("bf16", "bf16"), ("f32", "f16")]):
        case = random_case(2, 530, pair, grads=grads)
        case.upstream = [u if i in used else None for i, u in enumerate(case.upstream)]
        cases.append(moved(case, 3, 0))
    run_and_check(emulator, cases)


@pytest.mark.parametrize(
    "pair", [("f32", "f32"), ("bf16", "bf16"), ("f32", "f16"), ("bf16", "f32"), ("f64", "f64")], ids="-".join
)
@pytest.mark.parametrize("used", [range(9), (0, 1)], ids=["all", "logprobs"])
def test_in_place(used, pair, emulator):
    """The gradient where the logits lay, at every address: bit for bit the gradient written elsewhere."""
    for grads in [("in place", "in place"), ("in place", "apart"), ("apart", "in place"), ("none", "in place")]:
        cases = []
        for by in range(8):
            for given in (grads, tuple("apart" if grad == "in place" else grad for grad in grads)):
                case = moved(random_case(1, 4099 if by % 4 == 1 else 131, pair, grads=given), by, 3 * by % 8)
                case.upstream = [u if i in used else None for i, u in enumerate(case.upstream)]
                cases.append(case)
        results = emulator.run(cases)
        for ours, expected in zip(results[::2], results[1::2], strict=True):
            for grad, of_expected in zip(ours[1:], expected[1:], strict=True):
                assert grad is of_expected or torch.equal(grad, of_expected)


# ----------------------------------------------------------------------------------------------------------
# A second witness
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(EXTENSION.module is None, reason="the extension is not built")
@with_pairs
def test_as_on_the_cpu(pair, emulator):
    cases = [random_case(4, size, pair) for size in (9, 530, 4099)]
    for case, result in zip(cases, emulator.run(cases), strict=True):
        inputs = (case.policy.requires_grad_(), case.reference.requires_grad_())
        expected = token_statistics(*inputs, case.labels, backend="fused")
        for i, name in enumerate(FIELDS):
            torch.testing.assert_close(result.statistics[i], expected[i], rtol=1e-5, atol=1e-5, msg=name)
        upstream = [u.to(expected[0].dtype) for u in case.upstream]
        for ours, grad in zip(result[1:], torch.autograd.grad(list(expected), inputs, upstream), strict=True):
            # One unit of the gradient's own dtype: the two are rounded from numbers that differ in float32's last bits.
            rtol = max(1e-5, torch.finfo(ours.dtype).eps)
            torch.testing.assert_close(ours, grad, rtol=rtol, atol=1e-5)
