"""A vocabulary in slices on CUDA's kernels: as the whole, whatever the slices are and hold, and as on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lit_did.ops.extension import EXTENSION
from tests.cuda.comparing import PAIRS, PART, moved, random_case, run_and_check, softcapped_cases
from tests.cuda.emulator import TokenCase
from tests.helpers import DTYPES, FIELDS, random_logits

INF, NAN = torch.inf, torch.nan
CUTS = {"one": [0], "two": [0, 64], "uneven": [0, 1, 40, 512], "many": list(range(0, 1000, 90))}
with_pairs = pytest.mark.parametrize(
    "pair", [("f32", "f32"), ("bf16", "bf16"), ("f16", "f32"), ("f64", "f64")], ids="-".join
)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_values_and_gradients(pair, emulator):
    """Slices that begin off every boundary, gradients apart and in place, and tokens that are ignored."""
    cases = []
    for seed, cuts in enumerate(CUTS.values()):
        grads = ("in place", "apart") if seed % 2 else ("apart", "in place")
        case = moved(random_case(4, 1001, pair, seed, slices=cuts, grads=grads, temperature=1.3), seed, 3)
        case.labels[:2] = torch.tensor([cuts[-1], max(cuts[-1] - 1, 0)])
        case.labels[2] = -100
        case.upstream = [u if seed < 2 or i < 2 else None for i, u in enumerate(case.upstream)]
        cases.append(case)
    run_and_check(emulator, cases)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_softcaps(pair, emulator):
    run_and_check(emulator, [moved(case, 1, 3) for case in softcapped_cases(pair, slices=CUTS["two"])])


@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("f32", "f32")], ids="-".join)
def test_parts_of_a_slice(pair, emulator):
    """Tiles of one, two and three slices of 4,096 entries, the last of which may have fewer."""
    cuts = [0, PART, 3 * PART - 4, 5 * PART + 3]
    case = moved(random_case(5, 7 * PART + 9, pair, slices=cuts, upstream=None), 2, 1)
    case.labels[:4] = torch.tensor(cuts)
    case.labels[4] = -100
    run_and_check(emulator, [case])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_one_slice_is_the_whole(dtype, emulator):
    """To float64's digits, though the log-ratios' origin, some hundreds, is rounded to the logits' dtype."""
    case = random_case(5, 1000, (dtype, dtype), upstream=None)
    case.policy = case.reference + torch.tensor([0.0, 300.37, -77.7, 900.1, 1234.5])[:, None]
    whole, sliced = emulator.run([case, replace(case, slices=[0])])
    torch.testing.assert_close(sliced.statistics, whole.statistics, rtol=2e-7 if dtype == "f32" else 1e-14, atol=2e-12)


@with_pairs
def test_large_logits_and_slices_far_apart(pair, emulator):
    """Origins that differ by hundreds between the slices, and so do those of the ratio."""
    cases = []
    for cuts in CUTS.values():
        case = random_case(4, 1000, pair, slices=cuts)
        case.policy[:, 64:] += 100
        case.reference[:, :40] -= 100
        case.policy[0], case.reference[1] = case.policy[0] + 1e4, case.reference[1] - 1e4
        cases.append(case)
    run_and_check(emulator, cases)


@with_pairs
def test_values_that_are_not_finite(pair, emulator):
    """One entry, all of a slice and several slices that are infinite on a side or both, or NaN: as the whole row is."""
    values = [(-INF, -INF), (-INF, None), (None, -INF), (-INF, 0.5), (NAN, None), (None, INF), (-INF, NAN), (INF, -INF)]
    for entries in ([0], [3, 39, 511, 999], range(40, 512), range(40), range(40, 1000), range(1000)):
        policy, reference, labels = random_logits(len(values), 1000, *(DTYPES[name] for name in pair))
        entries = torch.tensor(list(entries))
        labels[1::2] = entries[0]
        for row, sides in enumerate(values):
            for logits, value in zip((policy, reference), sides, strict=True):
                if value is not None:
                    logits[row, entries] = value
        whole = TokenCase(policy, reference, labels, upstream=list(torch.ones(9, len(values))))
        expected, *results = emulator.run([whole, *(replace(whole, slices=cuts) for cuts in CUTS.values())])
        for result in results:
            for ours, value in zip(result, expected, strict=True):
                close = {"rtol": 4e-3, "atol": 1e-3} if ours.dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(ours, value, equal_nan=True, **close)


def test_labels_out_of_range(emulator):
    """NaN log-probabilities and gradients; the other statistics do not know of labels."""
    case = random_case(4, 100, slices=[0, 30, 60])
    (right,) = emulator.run([case])
    case.labels[:3] = torch.tensor([-1, 100, 2**40])
    (result,) = emulator.run([case])
    assert result.statistics[:2, :3].isnan().all()
    assert torch.equal(result.statistics[2:], right.statistics[2:])
    assert all(
        grad[:3].isnan().all() and torch.equal(grad[3], of[3]) for grad, of in zip(result[1:], right[1:], strict=True)
    )


@pytest.mark.skipif(EXTENSION.module is None, reason="the extension is not built")
@with_pairs
def test_as_on_the_cpu(pair, emulator):
    """The CPU's operators on the same slices."""
    case = random_case(5, 1000, pair, slices=CUTS["uneven"], ignore_index=3)
    case.labels = case.labels.clamp(min=4)
    case.labels[1] = 3
    (result,) = emulator.run([case])
    operators, bounds = torch.ops.lit_did, [*case.slices, 1000]
    partials = torch.full((4, 5, 16), NAN, dtype=torch.float64)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        logits = case.policy[:, begin:end], case.reference[:, begin:end]
        operators.token_partials_(*logits, case.labels, partials[i : i + 1], end - begin, begin, 3, 1.0)
    *expected, _ = operators.finish_token_partials(partials, case.labels, 3, pair[0] == "f64")
    for i, name in enumerate(FIELDS):
        torch.testing.assert_close(result.statistics[i], expected[i], rtol=1e-5, atol=1e-5, msg=name)


def test_any_address_and_order(emulator):
    case = random_case(3, 500, ("bf16", "bf16"), slices=[0, 7, 130])
    others = [moved(replace(case, seed=by), by, 3 * by % 8) for by in range(1, 8)]
    expected, *results = emulator.run([case, *others])
    for result in results:
        assert all(map(torch.equal, result, expected))
