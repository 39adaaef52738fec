"""Infinite, NaN and masked logits in the CUDA kernels: the rules of lit_did/ops/reference.py, which runs in float64."""

from __future__ import annotations

import pytest
import torch

from lit_did.ops import reference as specification
from tests.cuda.comparing import SPLIT
from tests.cuda.emulator import Layout, TokenCase
from tests.helpers import DTYPES

INF, NAN = torch.inf, torch.nan

# Vocabulary and the entries that are not ordinary: in whole chunks and the tail, in threads, warps and splits.
PLACES = {
    "one-in-a-chunk": (37, [3]),
    "one-in-the-tail": (37, [36]),
    "a-short-row": (5, [0, 3]),
    "chunks-and-tail": (530, [0, 1, 17, 200, 511, 512, 529]),
    "whole-warps": (4099, range(2048)),
    "all-but-two": (1100, [i for i in range(1100) if i not in (600, 1099)]),
    "the-whole-tail": (531, [*range(528, 531)]),
    "two-splits": (SPLIT + 5, [7, SPLIT - 1, SPLIT, SPLIT + 4]),
    "the-first-split": (SPLIT + 600, range(SPLIT)),
    "the-last-split": (SPLIT + 21, range(SPLIT, SPLIT + 21)),
}
# What stands there, on the policy's side and the reference's; None: an ordinary logit.
VALUES = [
    *((-INF, -INF), (-INF, None), (None, -INF)),
    *((NAN, None), (None, NAN), (NAN, NAN), (INF, None), (None, INF), (INF, INF), (NAN, -INF), (-INF, INF)),
    *((-1e9, -1e9), (-1e9, None), (None, -1e9), ("min", "min"), ("min", None), (None, "min"), (2e6, None)),
]
with_pairs = pytest.mark.parametrize("pair", [("f32", "f32"), ("bf16", "f16"), ("f64", "f64")], ids="-".join)


def rows_of(vocabulary, entries, values, pair):
    """Logits, labels, and which rows have `values` at `entries`, three of four; the first has not."""
    generator = torch.Generator().manual_seed(3)
    rows = len(values) + (len(values) + 2) // 3 + 1
    changed = torch.tensor([i for i in range(rows) if i % 4][: len(values)])
    policy = 3 * torch.randn(rows, vocabulary, generator=generator)
    reference = policy + torch.randn(rows, vocabulary, generator=generator)
    sides = [policy.to(DTYPES[pair[0]]), reference.to(DTYPES[pair[1]])]
    entries = torch.tensor(list(entries))
    for row, row_values in zip(changed, values, strict=True):
        for logits, value in zip(sides, row_values, strict=True):
            if value == "min":  # float16's is a logit like any other
                value = -INF if logits.dtype == torch.float16 else torch.finfo(logits.dtype).min
            if value is not None:
                logits[row, entries] = value
    support = torch.ones(vocabulary, dtype=torch.bool)
    support[entries] = False
    # The last ordinary entry; but a row in three of the others has its label where something else stands.
    labels = torch.full((rows,), int(support.nonzero()[-1]) if support.any() else 0)
    labels[1::4] = entries[0]
    return *sides, labels, changed


def assert_as_specified(case, result):
    inputs = tuple(x.double().requires_grad_() for x in (case.policy, case.reference))
    expected = specification.token_statistics(*inputs, case.labels, case.ignore_index, case.temperature)
    grads = torch.autograd.grad(list(expected), inputs, [u.double() for u in case.upstream])
    double = case.policy.dtype == torch.float64
    close = {"rtol": 1e-11, "atol": 1e-11} if double else {"rtol": 4e-6, "atol": 4e-6}
    for ours, value in zip(result.statistics, expected, strict=True):
        torch.testing.assert_close(ours.double(), value, equal_nan=True, **close)
    for ours, grad in zip(result[1:], grads, strict=True):
        # A unit of the gradient's own dtype, and float32's arithmetic.
        rtol, atol = (1e-10, 1e-10) if double else (max(1e-5, torch.finfo(ours.dtype).eps), 1e-5)
        torch.testing.assert_close(ours.double(), grad, equal_nan=True, rtol=rtol, atol=atol)


@with_pairs
@pytest.mark.parametrize("place", PLACES)
def test_as_the_specification(place, pair, emulator):
    vocabulary, entries = PLACES[place]
    values = VALUES if vocabulary < SPLIT else VALUES[:8]
    policy, reference, labels, changed = rows_of(vocabulary, entries, values, pair)
    upstream = list(torch.randn(9, len(labels), generator=torch.Generator().manual_seed(4)))
    case = TokenCase(policy, reference, labels, upstream=upstream, layouts=(Layout(0), Layout(1)))
    (result,) = emulator.run([case])
    assert_as_specified(case, result)
    # The rows between: the bits that they have without such neighbours.
    ordinary = torch.ones(len(labels), dtype=torch.bool)
    ordinary[changed] = False
    alone = TokenCase(policy[ordinary], reference[ordinary], labels[ordinary], upstream=[u[ordinary] for u in upstream])
    (expected,) = emulator.run([alone])
    assert torch.equal(result.statistics[:, ordinary], expected.statistics)
    for ours, grad in zip(result[1:], expected[1:], strict=True):
        assert torch.equal(ours[ordinary], grad)


@with_pairs
def test_sides_without_support(pair, emulator):
    """Nothing finite on one side or both, and supports without a common entry."""
    cases = []
    for vocabulary in (1, 5, 530, SPLIT + 5):
        policy, reference, labels, _ = rows_of(vocabulary, [0], [(None, None)] * 3, pair)
        policy[1], reference[2], policy[3], reference[3] = -INF, -INF, -INF, -INF
        upstream = list(torch.randn(9, len(labels), generator=torch.Generator().manual_seed(4)))
        cases.append(TokenCase(policy, reference, labels, upstream=upstream))
        if vocabulary > 1:
            half = vocabulary // 2
            policy, reference = policy[::2].clone(), reference[::2].clone()
            policy[:, :half], reference[:, half:] = -INF, -INF
            cases.append(TokenCase(policy, reference, labels[::2], upstream=[u[::2] for u in upstream]))
    for case, result in zip(cases, emulator.run(cases), strict=True):
        assert_as_specified(case, result)


@pytest.mark.parametrize(("temperature", "infinite", "finite"), [(0.25, -3e5, -2e5), (4.0, -5e6, -3e6)])
def test_the_limit_is_divided_by_the_temperature(temperature, infinite, finite, emulator):
    """Beyond 1e6 once divided by the temperature a logit is infinite; before, a logit like any other."""
    values = [(infinite, None), (infinite, infinite), (finite, None)]
    policy, reference, labels, _ = rows_of(530, [0, 17, 529], values, ("f32", "f32"))
    (result,) = emulator.run([TokenCase(policy, reference, labels, temperature=temperature)])
    assert result.statistics[8, 1] == INF
    assert result.statistics[8, [2, 3]].isfinite().all()
    rows = [0, 1, 2]  # in row 3 float32 has few digits left
    exact = tuple(x[rows].double() for x in (policy, reference))
    expected = torch.stack(specification.token_statistics(*exact, labels[rows], -100, temperature))
    torch.testing.assert_close(result.statistics[:, rows].double(), expected, equal_nan=True, rtol=4e-6, atol=4e-6)
