"""What the tests of the CUDA kernels compare with, and the cases that more than one of them runs."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from tests.cuda.emulator import CSRC, Emulator, Layout, TokenCase, TokenResult
from tests.helpers import DTYPES, FIELDS, assert_no_worse_than, naive, random_logits, truth

# Both sides' dtypes: float64 goes with float64 alone.
PAIRS = [*((p, r) for p in ("f32", "bf16", "f16") for r in ("f32", "bf16", "f16")), ("f64", "f64")]


def constant(header: str, name: str) -> int:
    """A kernel's constant: sizes that are awkward for one value of it are not for another."""
    (value,) = re.findall(rf"^constexpr \w+ {name} = (\d+);", (CSRC / "cuda" / header).read_text(), re.MULTILINE)
    return int(value)


SPLIT = constant("kernels.h", "kEntriesABlock")
PART = constant("kernels.h", "kPartEntries")
FEW_PARTS = constant("forward.cuh", "kFewParts")


def random_case(rows: int, vocabulary: int, pair: tuple[str, str] = ("f32", "f32"), seed: int = 0, **more) -> TokenCase:
    """Logits as in the operators' tests, with a gradient for each statistic."""
    policy, reference, labels = random_logits(rows, vocabulary, DTYPES[pair[0]], DTYPES[pair[1]], seed)
    upstream = list(torch.randn(9, rows, generator=torch.Generator().manual_seed(seed)))
    return TokenCase(policy, reference, labels, **{"upstream": upstream, "seed": seed + 1} | more)


def softcapped_cases(pair: tuple[str, str], **more) -> list[TokenCase]:
    """Softcaps of one side and of both, with gradients of all statistics and of log-probabilities alone."""
    cases = []
    for seed, softcaps in enumerate([(3.0, 2.0), (None, 2.0), (3.0, None), (1.0, 1.0)]):
        case = random_case(4, 1001, pair, seed, softcaps=softcaps, grads=("in place", "apart"), **more)
        for logits, softcap in zip((case.policy, case.reference), softcaps, strict=True):
            if softcap is not None:
                logits.copy_(softcap * torch.tanh(logits.double() / softcap))
        case.labels[:3] = torch.tensor([63, 1000, -100])
        cases += [case, replace(case, upstream=case.upstream[:2] + [None] * 7)]
    return cases


def among_many(case: TokenCase) -> TokenCase:
    """The case's only row before so many ignored ones that a block of the forward takes several parts of a row.

    All rows are one in memory.
    """
    rows, vocabulary = case.policy.shape
    assert rows == 1
    rows = FEW_PARTS // -(-vocabulary // PART) + 1
    case.policy, case.reference = case.policy.expand(rows, -1), case.reference.expand(rows, -1)
    case.labels = torch.cat([case.labels, case.labels.new_full((rows - 1,), case.ignore_index)])
    case.layouts, case.upstream = (Layout(one=True), Layout(one=True)), None
    return case


def moved(case: TokenCase, policy: int, reference: int, gap: int = 0) -> TokenCase:
    """The same with rows that begin that many entries after a 64-byte boundary, the gradients' elsewhere still."""
    case.layouts = (Layout(policy, gap), Layout(reference, gap))
    case.grad_layouts = (Layout(reference, gap), Layout(policy + 1, gap))
    return case


def run_and_check(emulator: Emulator, cases: list[TokenCase]) -> list[TokenResult]:
    results = emulator.run(cases)
    for case, result in zip(cases, results, strict=True):
        assert_right(case, result)
    return results


def assert_right(case: TokenCase, result: TokenResult) -> None:
    """Values and gradients against truth, with naive as the measure. For finite logits and labels in range."""
    vocabulary = case.policy.shape[-1]
    kept = (case.labels != case.ignore_index).flatten()
    statistics = result.statistics.view(9, -1)
    grads = [None if g is None else g.reshape(-1, vocabulary) for g in (result.policy_grad, result.reference_grad)]
    assert (statistics[:, ~kept] == 0).all()
    assert all((g[~kept] == 0).all() for g in grads if g is not None)
    if not kept.any():
        return
    policy, reference = (x.reshape(-1, vocabulary)[kept].requires_grad_() for x in (case.policy, case.reference))
    labels = case.labels.flatten()[kept]
    given = [
        torch.zeros_like(case.labels, dtype=torch.float32) if u is None else u for u in case.upstream or [None] * 9
    ]
    upstream = torch.stack([u.flatten()[kept] for u in given])
    expected = truth(policy, reference, labels, upstream, case.temperature)
    plain = naive(policy, reference, labels, case.temperature)
    what = f"V = {vocabulary}, {policy.dtype} and {reference.dtype}, {case.layouts}: "
    for i, name in enumerate(FIELDS):
        ours, (values, terms) = statistics[i, kept], (expected.values[i], expected.value_terms[i])
        assert_no_worse_than(ours, plain[i], values, terms, what + name)
    of_naive = torch.autograd.grad(plain, (policy, reference), list(upstream.to(plain[0].dtype)))
    truths = [expected.policy_grad, expected.reference_grad]
    terms = [expected.policy_terms, expected.reference_terms]
    for i, (side, logits) in enumerate((("policy", policy), ("reference", reference))):
        slope = torch.ones(1) if case.softcaps[i] is None else 1 - (logits.detach().double() / case.softcaps[i]) ** 2
        if grads[i] is not None:
            theirs, right = (of_naive[i] * slope).to(logits.dtype), truths[i] * slope.numpy()
            assert_no_worse_than(grads[i][kept], theirs, right, terms[i], what + f"{side}'s gradient")
