"""Statistics of slices merge into those of the whole vocabulary, whatever the slices are and hold."""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_did.ops import reference as specification
from lit_did.ops.partials import NO_LABEL, NUM_PARTIALS, Partials
from tests.helpers import DTYPES, FIELDS, assert_no_worse_than, naive, random_logits, truth

INF, NAN = torch.inf, torch.nan
VOCABULARY = 1100
CUTS = {"one": [], "uneven": [1, 40, 512], "narrow": [*range(50, VOCABULARY, 50)]}
PAIRS = [("f32", "f32"), ("bf16", "f16"), ("f64", "f64")]
with_pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
with_cuts = pytest.mark.parametrize("cuts", CUTS)


def sliced(policy, reference, labels, cuts, temperature=1.0):
    """What the slices say, a few tokens at a time."""
    partials = Partials(labels, NO_LABEL, temperature, len(cuts) + 1, 1, VOCABULARY)
    partials.slice_entries = VOCABULARY  # the blocks differ
    for begin, end in itertools.pairwise([0, *cuts, policy.shape[-1]]):
        partials.begin_block(end - begin)
        for tokens in (slice(0, 2), slice(2, len(labels))):
            partials.add(policy[tokens, begin:end], reference[tokens, begin:end], tokens, begin)
    return partials


def finished(partials, policy):
    return partials.finish(torch.float64 if policy.dtype == torch.float64 else torch.float32)


def fused(policy, reference, labels, temperature=1.0):
    *statistics, normalizers = torch.ops.lit_did.token_statistics(policy, reference, labels, -100, temperature)
    return statistics, normalizers


def with_values(values, entries, pair):
    """Rows 1, 3, 5 ... with those (policy, reference) values at `entries` (None: as it was), between ordinary ones."""
    policy, reference, labels = random_logits(2 * len(values) + 1, VOCABULARY, *(DTYPES[name] for name in pair))
    for row, (z, r) in enumerate(values):
        for side, value in ((policy, z), (reference, r)):
            if value is not None:
                side[2 * row + 1, entries] = value
    return policy, reference, labels


@with_pairs
@with_cuts
def test_values(pair, cuts):
    policy, reference, labels = random_logits(9, VOCABULARY, *(DTYPES[name] for name in pair))
    statistics, normalizers = finished(sliced(policy, reference, labels, CUTS[cuts], 1.3), policy)
    expected = truth(policy, reference, labels, torch.zeros(9, 9), 1.3)
    for i, (ours, plain) in enumerate(zip(statistics, naive(policy, reference, labels, 1.3), strict=True)):
        assert_no_worse_than(ours, plain, expected.values[i], expected.value_terms[i], FIELDS[i])
    _, of_whole = fused(policy, reference, labels, 1.3)
    # The sums of float32 exponentials, whose rounding depends on the maxima before them.
    tolerance = 1e-13 if pair[0] == "f64" else 3e-7
    torch.testing.assert_close(normalizers, of_whole, rtol=tolerance, atol=tolerance)


@with_pairs
def test_one_slice_is_the_whole(pair):
    """To float64's digits, though the log-ratios' origin, some hundreds, is rounded to the logits' dtype."""
    policy, reference, labels = random_logits(9, VOCABULARY, *(DTYPES[name] for name in pair))
    policy[:3] += torch.tensor([300.37, -77.7, 900.1])[:, None]
    statistics, normalizers = finished(sliced(policy, reference, labels, []), policy)
    expected, of_whole = fused(policy, reference, labels)
    eps = torch.finfo(statistics.kl.dtype).eps
    for ours, value in zip(statistics, expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=eps, atol=2e-12)
    torch.testing.assert_close(normalizers, of_whole, rtol=1e-15, atol=0)


def test_any_grouping():
    policy, reference, labels = random_logits(9, VOCABULARY, torch.float64, torch.float64)
    policy[3, 40:512], reference[4, :40], policy[5, 7], reference[6, 600:] = -INF, -INF, -INF, -INF
    labels[:2] = 0
    partials = sliced(policy, reference, labels, CUTS["uneven"])
    slices = partials.memory.clone()
    statistics, normalizers = finished(partials, policy)

    def merged(*numbers):
        partials.memory, partials.used = slices[list(numbers)], len(numbers)
        partials.merge()
        assert partials.used == 1
        return partials.memory[0]

    groups = [(merged(0, 1, 2), slices[3]), (slices[0], merged(1, 2, 3)), slices.flip(0), [merged(0, 1, 2, 3)]]
    for group in groups:
        partials.memory, partials.used = torch.stack(list(group)), len(group)
        again, again_normalizers = finished(partials, policy)
        for ours, value in zip((*again, again_normalizers), (*statistics, normalizers), strict=True):
            torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12, equal_nan=True)


SIDES = [(-INF, -INF), (-INF, None), (None, -INF), (-1e9, None), (None, -1e9), (-INF, 0.5)]
BROKEN = [(NAN, None), (None, NAN), (INF, None), (None, INF), (INF, INF), (NAN, -INF), (-INF, INF), (-INF, NAN)]


@with_pairs
@with_cuts
@pytest.mark.parametrize("entries", [[0], [3, 39, 511, 1099], range(40, 512), range(1), range(40, 1100)], ids=str)
def test_values_that_are_not_finite(pair, cuts, entries):
    """In a slice, all of a slice and several slices: as the whole row is specified, and no other row is touched."""
    values = [value for value in SIDES + BROKEN if "f16" not in pair or -1e9 not in value]
    entries = torch.tensor(list(entries))
    policy, reference, labels = with_values(values, entries, pair)
    labels[1::4] = entries[0]
    statistics, normalizers = finished(sliced(policy, reference, labels, CUTS[cuts]), policy)
    expected = specification.token_statistics(policy.double(), reference.double(), labels, -100, 1.0)
    tolerance = 1e-11 if pair[0] == "f64" else 4e-6
    for name, ours, value in zip(FIELDS, statistics, expected, strict=True):
        close = torch.isclose(ours.double(), value, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert close.all(), (name, ours, value)
    _, of_whole = fused(policy, reference, labels)
    torch.testing.assert_close(normalizers, of_whole, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert torch.equal(normalizers[:, 3], of_whole[:, 3])  # flags
    ordinary = slice(0, None, 2)
    inputs = policy[ordinary], reference[ordinary], labels[ordinary]
    alone, _ = finished(sliced(*inputs, CUTS[cuts]), policy)
    for ours, value in zip(statistics, alone, strict=True):
        assert torch.equal(ours[ordinary], value)


@with_pairs
def test_sides_without_support(pair):
    """Nothing finite on a side; and supports without a common entry, in a slice or in none."""
    policy, reference, labels = random_logits(6, VOCABULARY, *(DTYPES[name] for name in pair))
    policy[0], reference[1] = -INF, -INF
    policy[2], reference[2] = -INF, -INF
    policy[3, :512], reference[3, 512:] = -INF, -INF
    policy[4, :20], reference[4, 20:] = -INF, -INF
    for cuts in CUTS.values():
        statistics, normalizers = finished(sliced(policy, reference, labels, cuts, 1.3), policy)
        expected = specification.token_statistics(policy.double(), reference.double(), labels, -100, 1.3)
        for ours, value in zip(statistics, expected, strict=True):
            torch.testing.assert_close(ours.double(), value, equal_nan=True, rtol=4e-6, atol=4e-6)
        _, of_whole = fused(policy, reference, labels, 1.3)
        torch.testing.assert_close(normalizers, of_whole, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_shares_far_below_float64():
    """A slice whose share of one side, e^-900, is 0 in float64 counts in the divergence all the same."""
    policy, reference, labels = random_logits(3, VOCABULARY, torch.float64, torch.float64)
    reference[:, :40] -= 900
    labels[:] = 5
    statistics, _ = finished(sliced(policy, reference, labels, CUTS["uneven"]), policy)
    expected = specification.token_statistics(policy, reference, labels, -100, 1.0)
    assert (expected.kl > 0.1).all()
    for ours, value in zip(statistics, expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-10, atol=1e-10)


def test_a_label_that_no_slice_holds():
    """NaN log-probabilities; the other statistics do not know of labels."""
    policy, reference, labels = random_logits(3, VOCABULARY, torch.float32, torch.float32)
    right, _ = finished(sliced(policy, reference, labels, CUTS["uneven"]), policy)
    labels[1:] = torch.tensor([-1, VOCABULARY])
    statistics, _ = finished(sliced(policy, reference, labels, CUTS["uneven"]), policy)
    for ours, value in zip(statistics[:2], right[:2], strict=True):
        assert ours[0] == value[0]
        assert ours[1:].isnan().all()
    for ours, value in zip(statistics[2:], right[2:], strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize(("slices", "block"), [(1, 1), (8, 1), (9, 1), (30, 1), (30, 4), (30, 7), (30, 12), (5, 9)])
def test_ignored_tokens_and_many_slices(slices, block):
    """Ignored tokens are not read, and return 0. Slices are merged on the way, so that they take little memory.

    The bits do not depend on how many slices a block has.
    """
    policy, reference, labels = random_logits(9, 10 * slices, torch.float32, torch.float32)
    labels %= 10
    expected, _ = finished(sliced(policy, reference, labels, range(10, 10 * slices, 10)), policy)
    kept, ignored = [0, 1, 3, 4, 5, 6, 7], [2, 8]
    labels[ignored], policy[ignored] = -7, NAN
    partials = Partials(labels, -7, 1.0, 10 * slices, 10 * block, 10)
    partials.memory.fill_(NAN)
    for first in range(0, 10 * slices, 10 * block):
        entries = slice(first, min(first + 10 * block, 10 * slices))
        partials.begin_block(entries.stop - first)
        partials.add(policy[:, entries], reference[:, entries], slice(0, 9), first)
    assert len(partials.memory) <= max(8, block + 1)
    assert partials.memory[:, ignored].isnan().all()
    statistics, normalizers = finished(partials, policy)
    assert (normalizers[ignored] == 0).all()
    for ours, value in zip(statistics, expected, strict=True):
        assert (ours[ignored] == 0).all()
        assert torch.equal(ours[kept], value[kept])


def test_bad_operator_calls():
    policy, reference, labels = random_logits(3, 10, torch.float32, torch.float32)
    operators, memory = torch.ops.lit_did, torch.zeros(2, 3, NUM_PARTIALS, dtype=torch.float64)
    wrong = (memory[0], memory[:, :2], memory.float(), memory.mT.contiguous().mT, memory.repeat(1, 1, 2)[..., ::2])
    for bad in (*wrong, memory[:1], memory.repeat(2, 1, 1)):
        with pytest.raises(RuntimeError, match="partials"):
            operators.token_partials_(policy, reference, labels, bad, 7, 0, -100, 1.0)
    with pytest.raises(RuntimeError, match="partials"):
        operators.token_partials_(policy, reference, labels, memory, 0, 0, -100, 1.0)
    for bad in wrong:
        with pytest.raises(RuntimeError, match="partials"):
            operators.merge_token_partials_(bad, labels, -100)
        with pytest.raises(RuntimeError, match="partials"):
            operators.finish_token_partials(bad, labels, -100, False)
    with pytest.raises(RuntimeError, match="labels"):
        operators.finish_token_partials(memory, labels.int(), -100, False)
