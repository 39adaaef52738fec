"""token_statistics: values and gradients against the formulas, over sizes, dtypes, layouts and what the loss uses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lit_did import token_statistics
from tests.helpers import DTYPES, FIELDS, assert_no_worse_than, naive, random_logits, truth

BACKENDS = ("fused", "reference")
VECTOR = 16  # float32 entries in the widest vector; a block is 512 entries, a split 16,384
SIZES = {
    1: "nothing but the label",
    2: "the smallest distribution",
    5: "below the narrowest vector but one",
    VECTOR - 1: "below one vector",
    VECTOR: "one vector",
    VECTOR + 1: "one left over",
    511: "below one block",
    513: "one past a block",
    16384: "one split",
    16385: "one past a split",
}
MODEL_SIZES = {50257: "GPT-2", 151936: "Qwen"}


def gradients(statistics, inputs, upstream):
    """Gradients of sum(upstream * statistics) over the statistics whose upstream is not None."""
    used = [(s, u) for s, u in zip(statistics, upstream, strict=True) if u is not None]
    return torch.autograd.grad([s for s, _ in used], inputs, [u.to(s.dtype) for s, u in used], allow_unused=True)


def check(policy, reference, labels, backend, temperature=1.0):
    """Values and both gradients of one call against truth, with naive as the measure."""
    policy, reference = policy.detach().requires_grad_(), reference.detach().requires_grad_()
    double = torch.float64 in (policy.dtype, reference.dtype)
    upstream = torch.randn(9, *labels.shape, generator=torch.Generator().manual_seed(1))
    expected = truth(policy, reference, labels, upstream, temperature)

    ours = token_statistics(policy, reference, labels, temperature=temperature, backend=backend)
    plain = naive(policy, reference, labels, temperature)
    for i, name in enumerate(FIELDS):
        assert ours[i].dtype == (torch.float64 if double else torch.float32)
        assert_no_worse_than(ours[i], plain[i], expected.values[i], expected.value_terms[i], name)

    ours, plain = (gradients(s, (policy, reference), upstream) for s in (ours, plain))
    assert ours[0].dtype == policy.dtype
    assert ours[1].dtype == reference.dtype
    assert_no_worse_than(ours[0], plain[0], expected.policy_grad, expected.policy_terms, "policy's gradient")
    assert_no_worse_than(ours[1], plain[1], expected.reference_grad, expected.reference_terms, "reference's gradient")


# ----------------------------------------------------------------------------------------------------------
# Values and gradients
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_values_and_gradients(vocabulary, dtype, backend):
    check(*random_logits(6 if vocabulary < 1000 else 2, vocabulary, DTYPES[dtype], DTYPES[dtype]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("policy", "reference"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f16")])
@pytest.mark.parametrize("vocabulary", MODEL_SIZES)
def test_vocabularies_of_language_models(vocabulary, policy, reference, backend):
    check(*random_logits(2, vocabulary, DTYPES[policy], DTYPES[reference]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("policy", "reference"), list(itertools.permutations(DTYPES, 2)))
def test_two_dtypes(policy, reference, backend):
    check(*random_logits(6, 530, DTYPES[policy], DTYPES[reference]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.6, 2.5, 1])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_temperature(dtype, temperature, backend):
    check(*random_logits(6, 530, DTYPES[dtype], DTYPES[dtype]), backend, temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("label", [0, VECTOR - 1, VECTOR, 511, 512, 1023, 1024, 1029], ids=lambda y: f"label{y}")
def test_the_label_wherever_it_lies(label, dtype, backend):
    """First, at the edges of vectors and blocks, and in the tail of 1,030 = 2 blocks + 6 entries."""
    policy, reference, labels = random_logits(2, 1030, DTYPES[dtype], DTYPES[dtype])
    check(policy, reference, torch.full_like(labels, label), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """Finite differences, which know nothing of the formulas. 11 float64 entries: a vector of any level, and a tail."""
    policy, reference, labels = random_logits(2, 11, torch.float64, torch.float64)
    labels[1] = -100
    inputs = (policy.requires_grad_(), reference.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z, r: tuple(token_statistics(z, r, labels, temperature=0.8, backend=backend)), inputs
    )


# ----------------------------------------------------------------------------------------------------------
# Inputs that can fail
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
@pytest.mark.parametrize("peak", [3, 514, 529], ids=lambda p: f"peak{p}")
def test_peaked(peak, side, dtype, backend):
    """One entry 110 above the rest: e^-110 is below float32, and a label elsewhere has a log-probability of -110."""
    policy, reference, labels = random_logits(4, 530, DTYPES[dtype], DTYPES[dtype])
    for name, logits in (("policy", policy), ("reference", reference)):
        if side in (name, "both"):
            logits[:, peak] = logits.amax(-1) + 110
    labels[:2] = peak
    assert (labels[2:] != peak).all()
    check(policy, reference, labels, backend)
    if side != "reference":
        logprob = token_statistics(policy, reference, labels, backend=backend).policy_logprob
        assert (logprob[2:] < -100).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [5, 530, 16385])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_policy_equal_to_the_reference(dtype, vocabulary, backend):
    """No divergence, and a uniform DID: H(q) = log Z = log V."""
    policy, _, labels = random_logits(4, vocabulary, DTYPES[dtype], DTYPES[dtype])
    statistics = token_statistics(policy, policy.clone(), labels, backend=backend)
    # Sums of weights are rounded a few times; log V is at most 10.
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == "f64" else 2e-6}
    uniform = torch.full_like(statistics.kl, math.log(vocabulary))
    torch.testing.assert_close(statistics.kl, torch.zeros_like(uniform), **tolerance)
    torch.testing.assert_close(statistics.reverse_kl, torch.zeros_like(uniform), **tolerance)
    torch.testing.assert_close(statistics.log_ratio, torch.zeros_like(uniform), **tolerance)
    torch.testing.assert_close(statistics.token_did_entropy, uniform, **tolerance)
    torch.testing.assert_close(statistics.token_did_log_partition, uniform, **tolerance)
    torch.testing.assert_close(statistics.token_did_concentration, torch.zeros_like(uniform), **tolerance)
    # The reference's gradient of a long row is off by what torch's softmax loses in adding 16,385 equal terms. So is
    # naive's, but for luck.
    if backend == "fused" or vocabulary < 16385:
        check(policy, policy.clone(), labels, backend)


@pytest.mark.parametrize("shift", [300, -300])
def test_policy_a_constant_above_the_reference(shift):
    """The same distribution: the rounding of the large maxima cancels. (In plain torch z - r has it.)"""
    reference, _, labels = random_logits(4, 2100, torch.float32, torch.float32)
    reference = (64 * reference).round() / 64
    statistics = token_statistics(reference + shift, reference, labels, backend="fused")
    for value in (statistics.kl, statistics.reverse_kl):
        torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1e-3, 1e-5])
def test_policy_near_the_reference(step, backend):
    """The first steps of training: divergences of step^2 out of terms near 1."""
    reference, _, labels = random_logits(4, 2050, torch.float32, torch.float32)
    check(reference + step * torch.randn(4, 2050), reference, labels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("policy_offset", "reference_offset"), [(1e4, 1e4), (-1e4, -1e4), (300, -300)])
def test_large_logits(policy_offset, reference_offset, backend):
    policy, reference, labels = random_logits(4, 530, torch.float32, torch.float32)
    check(policy + policy_offset, reference + reference_offset, labels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart(backend):
    """Logits over +-100: every distribution has one entry, and the DID another than the policy."""
    policy, reference, labels = random_logits(16, 530, torch.float32, torch.float32)
    check(policy * 30, reference.flip(-1) * 30, labels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("order", ["rising", "falling", "steps"])
def test_sorted_logits(order, dtype, backend):
    """Every block's maxima above those before it, below, or by a little more at each: where sums change origins."""
    policy, reference, labels = random_logits(3, 6000, DTYPES[dtype], DTYPES[dtype])
    if order == "steps":
        block = torch.arange(6000) // 256
        policy, reference = (
            x.clamp(-9, 9) + (block * step).to(x.dtype) for x, step in ((policy, 1.7), (reference, 0.6))
        )
    else:
        by_policy = policy[0].argsort(descending=order == "falling")
        policy, reference = policy[:, by_policy], reference[:, by_policy]
        policy[1], reference[1] = policy[1].sort(descending=order == "falling").values, reference[1]
        policy[2], reference[2] = policy[2], reference[2].sort(descending=order == "falling").values
    check(policy, reference, labels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
@pytest.mark.parametrize("place", [40, 1500], ids=["first-block", "later-block"])
def test_weights_near_underflow(place, side, dtype, backend):
    """Entries e^-85 to e^-104 below the largest: around 2^-126, float32's smallest normal number, and 2^-149, its last.

    With both sides so low, the difference is as large as any.
    """
    policy, reference, labels = random_logits(20, 2100, DTYPES[dtype], DTYPES[dtype])
    depth = torch.arange(85, 105, dtype=torch.float64)[:, None] + torch.rand(20, 5, dtype=torch.float64)
    for name, logits in (("policy", policy), ("reference", reference)):
        if side in (name, "both"):
            logits[:, place : place + 5] = (logits.amax(-1, keepdim=True) - depth).to(logits.dtype)
    check(policy, reference, labels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("place", [40, 1500], ids=["first-block", "later-block"])
def test_differences_above_those_of_the_maxima(place, dtype, backend):
    """The differences' weights are sums of 1 to e^120."""
    policy, reference, labels = random_logits(24, 2100, DTYPES[dtype], DTYPES[dtype])
    reference[:, place] = policy[:, place] - torch.linspace(0, 120, 24).to(policy.dtype)
    check(policy, reference, labels, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_a_later_block_far_above(side, dtype, backend):
    """By up to 2^1500: exponents that 8 bits do not hold, and that would be in range without the bits above; and by
    some 2^127, so that a sum is infinite although no weight is."""
    policy, reference, labels = random_logits(40, 2100, DTYPES[dtype], DTYPES[dtype])
    for name, logits in (("policy", policy), ("reference", reference)):
        if side in (name, "both"):
            logits[:30, 1500] = torch.linspace(5, 1040, 30).to(logits.dtype)
            above = logits[30:, :1024].amax(-1, keepdim=True) + torch.linspace(86, 89, 10)[:, None]
            logits[30:, 1440:1800:32] = above.to(logits.dtype)
    check(policy, reference, labels, backend)


# ----------------------------------------------------------------------------------------------------------
# Ignored rows
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 2**40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows(dtype, ignore_index, backend):
    """0 and a gradient of exactly 0, whatever they hold; their neighbours as if alone."""
    policy, reference, labels = random_logits(6, 530, DTYPES[dtype], DTYPES[dtype])
    labels = labels.clamp(min=4)
    kept = torch.tensor([True, False, True, False, False, True])
    labels[~kept] = ignore_index
    policy[1], reference[3], policy[4, 7], reference[4, 529] = torch.nan, torch.inf, -torch.inf, torch.nan
    policy.requires_grad_()
    reference.requires_grad_()
    statistics = token_statistics(policy, reference, labels, ignore_index=ignore_index, backend=backend)
    alone = token_statistics(policy[kept], reference[kept], labels[kept], backend=backend)
    for value, expected in zip(statistics, alone, strict=True):
        assert (value[~kept] == 0).all()
        assert torch.equal(value[kept], expected)
    ours = torch.autograd.grad([s.sum() for s in statistics], (policy, reference))
    expected = torch.autograd.grad([s.sum() for s in alone], (policy, reference))
    for grad, of_alone in zip(ours, expected, strict=True):
        assert (grad[~kept] == 0).all()
        assert torch.equal(grad[kept], of_alone[kept])
        assert (grad[kept] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_do(rows, backend):
    """No rows, or only ignored ones: zeros, and zero gradients."""
    policy, reference = torch.randn(rows, 20, requires_grad=True), torch.randn(rows, 20, requires_grad=True)
    statistics = token_statistics(policy, reference, torch.full((rows,), -100), backend=backend)
    for value in statistics:
        assert value.shape == (rows,)
        assert (value == 0).all()
    for grad in torch.autograd.grad([s.sum() for s in statistics], (policy, reference)):
        assert grad.shape == (rows, 20)
        assert (grad == 0).all()


# ----------------------------------------------------------------------------------------------------------
# Shapes and layouts: the numbers of the contiguous [rows, V] call, bit for bit
# ----------------------------------------------------------------------------------------------------------


def _transposed(logits):
    return logits.transpose(0, 1).contiguous().transpose(0, 1)


def _last_dimension_strided(logits):
    return torch.stack([logits, torch.full_like(logits, torch.nan)], -1).flatten(-2)[..., ::2]


def _last_dimension_first(logits):
    return logits.movedim(-1, 0).contiguous().movedim(0, -1)


def _inside_a_wider_row(logits):
    """Three entries in: rows neither start aligned nor follow one another. What surrounds them is NaN."""
    return torch.nn.functional.pad(logits, (3, 2), value=torch.nan)[..., 3:-2]


def _shifted(logits):
    """What causal language models give: all positions but the last."""
    return torch.cat([logits, torch.full_like(logits[:, :1], torch.nan)], 1)[:, :-1]


def _every_second_row(logits):
    return torch.stack([logits, torch.full_like(logits, torch.nan)], 2).flatten(1, 2)[:, ::2]


def _backwards_in_memory(logits):
    return logits.flip(0).as_strided(logits.shape, logits.stride()).flip(0)


LAYOUTS = [
    _transposed,
    _last_dimension_strided,
    _last_dimension_first,
    _inside_a_wider_row,
    _shifted,
    _every_second_row,
    _backwards_in_memory,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__[1:])
def test_layouts(layout, dtype, backend):
    policy, reference, labels = random_logits(12, 37, DTYPES[dtype], DTYPES[dtype])
    flat = (policy.requires_grad_(), reference.requires_grad_())
    expected = token_statistics(*flat, labels, backend=backend)
    expected_grads = torch.autograd.grad([s.sum() for s in expected], flat)

    leaves = tuple(x.detach().view(3, 4, 37).requires_grad_() for x in flat)
    laid_out = tuple(layout(x) for x in leaves)
    assert torch.equal(laid_out[0], leaves[0]), "the layout changed the numbers"
    ours = token_statistics(*laid_out, _transposed(labels.view(3, 4)), backend=backend)
    for value, value_expected in zip(ours, expected, strict=True):
        assert torch.equal(value.flatten(), value_expected)
    for grad, grad_expected in zip(torch.autograd.grad([s.sum() for s in ours], leaves), expected_grads, strict=True):
        assert torch.equal(grad.flatten(0, 1), grad_expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_rows(backend):
    """One reference row for every position: its gradient is the sum over them."""
    policy, reference, labels = random_logits(5, 37, torch.float64, torch.float64)
    row = reference[0].clone().requires_grad_()
    ours = token_statistics(policy, row.expand(5, 37), labels, backend=backend)
    copied = row.detach().expand(5, 37).contiguous().requires_grad_()
    expected = token_statistics(policy, copied, labels, backend=backend)
    for value, value_expected in zip(ours, expected, strict=True):
        assert torch.equal(value, value_expected)
    (grad,) = torch.autograd.grad(sum(s.sum() for s in ours), row)
    (grad_expected,) = torch.autograd.grad(sum(s.sum() for s in expected), copied)
    torch.testing.assert_close(grad, grad_expected.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (1, 12, 1), (0,), (3, 0)], ids=str)
def test_shapes(shape, backend):
    rows = math.prod(shape)
    policy, reference, labels = random_logits(max(rows, 1), 37, torch.float32, torch.bfloat16)
    expected = token_statistics(policy, reference, labels, backend=backend)
    policy, reference = (x[:rows].view(*shape, 37).requires_grad_() for x in (policy, reference))
    ours = token_statistics(policy, reference, labels[:rows].view(shape), backend=backend)
    for value, value_expected in zip((*ours, ours.log_ratio), (*expected, expected.log_ratio), strict=True):
        assert value.shape == shape
        assert torch.equal(value.flatten(), value_expected[:rows])
    for grad in torch.autograd.grad(ours.kl.sum(), (policy, reference)):
        assert grad.shape == (*shape, 37)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_dtypes_of_labels(dtype, backend):
    policy, reference, labels = random_logits(6, 100, torch.float32, torch.float32)
    expected = token_statistics(policy, reference, labels, backend=backend)
    ours = token_statistics(policy, reference, labels.to(dtype), backend=backend)
    assert torch.equal(ours.policy_logprob, expected.policy_logprob)


# ----------------------------------------------------------------------------------------------------------
# What the loss uses, and what needs a gradient: both decide which code runs
# ----------------------------------------------------------------------------------------------------------

USES = [*((i,) for i in range(9)), (0, 1), (0, 1, 2), (2, 7), (5, 6), tuple(range(9))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=["policy", "reference", "both"])
@pytest.mark.parametrize("used", USES, ids=lambda u: "+".join(FIELDS[i] for i in u) if len(u) < 8 else "all")
def test_used_statistics_and_needed_gradients(used, needs, backend):
    for dtype in (torch.float32, torch.bfloat16):
        policy, reference, labels = random_logits(4, 530, dtype, dtype)
        inputs = tuple(x.requires_grad_(n) for x, n in zip((policy, reference), needs, strict=True))
        wanted = [x for x in inputs if x.requires_grad]
        upstream = torch.zeros(9, 4)
        upstream[list(used)] = torch.randn(len(used), 4, generator=torch.Generator().manual_seed(2))
        expected = truth(*inputs, labels, upstream)
        given = [upstream[i] if i in used else None for i in range(9)]

        def grads(statistics, wanted=wanted, given=given):
            usable = [u if s.requires_grad else None for s, u in zip(statistics, given, strict=True)]
            if not any(u is not None for u in usable):
                return [torch.zeros_like(x) for x in wanted]
            found = gradients(statistics, wanted, usable)
            return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]

        ours = grads(token_statistics(*inputs, labels, backend=backend))
        plain = grads(naive(*inputs, labels))
        truths = [
            (expected.policy_grad, expected.policy_terms, "policy"),
            (expected.reference_grad, expected.reference_terms, "reference"),
        ]
        truths = [t for t, n in zip(truths, needs, strict=True) if n]
        for grad, of_naive, (of_truth, terms, side) in zip(ours, plain, truths, strict=True):
            assert_no_worse_than(grad, of_naive, of_truth, terms, f"{side}'s gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_needed(backend):
    policy, reference, labels = random_logits(2, 20, torch.float32, torch.float32)
    assert not token_statistics(policy, reference, labels, backend=backend).kl.requires_grad
    policy.requires_grad_()
    with torch.no_grad():
        assert not token_statistics(policy, reference, labels, backend=backend).kl.requires_grad


def test_second_derivatives():
    """The reference has them; the fused operator says that it does not, instead of leaving their terms out."""
    policy, reference, labels = random_logits(2, 20, torch.float64, torch.float64)
    policy.requires_grad_()
    (grad,) = torch.autograd.grad(
        token_statistics(policy, reference, labels, backend="reference").kl.sum(), policy, create_graph=True
    )
    assert torch.autograd.grad(grad.square().sum(), policy)[0].abs().max() > 0
    (grad,) = torch.autograd.grad(
        token_statistics(policy, reference, labels, backend="fused").kl.sum(), policy, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once: use `backend='reference'`"):
        torch.autograd.grad(grad.square().sum(), policy)
