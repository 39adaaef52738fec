"""Infinite and NaN logits: the values that lit_did/ops/reference.py documents, and gradients that stay in their row.

The truth for a row with holes (-inf) is the same row with its support alone, where every formula is finite.
"""

from __future__ import annotations

import pytest
import torch

from lit_did import token_statistics
from tests.helpers import DTYPES, FIELDS, assert_no_worse_than, naive, truth

BACKENDS = ("fused", "reference")
SPLIT = 16384
INF, NAN = torch.inf, torch.nan

# Vocabulary and the entries that are not finite: in whole vectors, in the tail, over blocks and splits.
PLACES = {
    "one-in-a-vector": (37, [3]),
    "one-in-the-tail": (37, [36]),
    "a-short-row": (5, [0, 3]),
    "vectors-and-tail": (530, [0, 1, 17, 200, 511, 512, 529]),
    "the-first-block": (1100, range(512)),
    "a-later-block": (3000, [2100]),
    "all-but-two": (1100, [i for i in range(1100) if i not in (600, 1099)]),
    "the-whole-tail": (530, [*range(528, 530)]),
    "two-splits": (2 * SPLIT + 5, [7, SPLIT - 1, SPLIT, 2 * SPLIT, 2 * SPLIT + 4]),
    "the-first-split": (SPLIT + 600, range(SPLIT)),
    "the-last-split": (2 * SPLIT + 5, range(SPLIT, 2 * SPLIT + 5)),
}
with_places = pytest.mark.parametrize("place", PLACES)
with_backends = pytest.mark.parametrize("backend", BACKENDS)
with_dtypes = pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])


def rows_with(place, dtype, policy_value, reference_value):
    """Three rows of logits whose middle one has the given values (None: as it was) at `place`, and finite entries."""
    vocabulary, entries = PLACES[place]
    entries = torch.tensor(list(entries))
    generator = torch.Generator().manual_seed(3)
    policy = 3 * torch.randn(3, vocabulary, generator=generator)
    reference = policy + torch.randn(3, vocabulary, generator=generator)
    policy, reference = policy.to(DTYPES[dtype]), reference.to(DTYPES[dtype])
    if policy_value is not None:
        policy[1, entries] = policy_value
    if reference_value is not None:
        reference[1, entries] = reference_value
    support = torch.ones(vocabulary, dtype=torch.bool)
    support[entries] = False
    labels = support.nonzero()[-1].expand(3).contiguous()
    return policy.requires_grad_(), reference.requires_grad_(), labels, support


def call(policy, reference, labels, backend, upstream):
    """Statistics and both gradients of one call."""
    statistics = token_statistics(policy, reference, labels, backend=backend)
    grads = torch.autograd.grad(list(statistics), (policy, reference), [u.to(statistics.kl.dtype) for u in upstream])
    return dict(zip(FIELDS, statistics, strict=True)), *grads


def without(upstream, *names):
    """`upstream` with the named statistics' gradients 0."""
    upstream = upstream.clone()
    upstream[[FIELDS.index(name) for name in names]] = 0
    return upstream


UPSTREAM = torch.randn(9, 3, generator=torch.Generator().manual_seed(4))


@with_backends
@with_dtypes
@with_places
def test_hole_on_both_sides(place, dtype, backend):
    """The entry does not exist: all as with the support alone, and a gradient of 0 at the hole."""
    policy, reference, labels, support = rows_with(place, dtype, -INF, -INF)
    values, *grads = call(policy, reference, labels, backend, UPSTREAM)
    inside = tuple(x.detach()[1:2, support].requires_grad_() for x in (policy, reference))
    label = support[: labels[1]].sum()[None]
    expected = truth(*inside, label, UPSTREAM[:, 1:2])
    plain = naive(*inside, label)
    for i, name in enumerate(FIELDS):
        assert_no_worse_than(values[name][1:2], plain[i], expected.values[i], expected.value_terms[i], name)
    plain = torch.autograd.grad(plain, inside, list(UPSTREAM[:, 1:2].to(plain[0].dtype)))
    truths = ((expected.policy_grad, expected.policy_terms), (expected.reference_grad, expected.reference_terms))
    for grad, of_naive, (of_truth, terms) in zip(grads, plain, truths, strict=True):
        assert (grad[1, ~support] == 0).all()
        assert_no_worse_than(grad[1:2, support], of_naive, of_truth, terms, "gradient")


@with_backends
@with_dtypes
@with_places
def test_hole_in_the_policy(place, dtype, backend):
    """Weight 0 for the policy: KL(rho, pi) is infinite and passes no gradient; the rest is as without the entry."""
    policy, reference, labels, support = rows_with(place, dtype, -INF, None)
    values, grad_policy, grad_reference = call(policy, reference, labels, backend, UPSTREAM)
    assert values["reverse_kl"][1] == INF
    z, r = policy.detach()[1].double(), reference.detach()[1].double()
    pi, log_rho = z.softmax(-1), r.log_softmax(-1)
    d = z[support] - r[support]
    expected = {
        "policy_logprob": z.log_softmax(-1)[labels[1]],
        "reference_logprob": log_rho[labels[1]],
        "token_did_entropy": torch.distributions.Categorical(logits=d).entropy(),
        "token_did_log_partition": d.logsumexp(-1) - z.logsumexp(-1) + r.logsumexp(-1),
        "policy_entropy": torch.distributions.Categorical(logits=z[support]).entropy(),
        "reference_entropy": torch.distributions.Categorical(logits=r).entropy(),
        "kl": (pi[support] * (z.log_softmax(-1)[support] - log_rho[support])).sum(),
    }
    for name, value in expected.items():  # float32's rounding of logits near 10
        torch.testing.assert_close(values[name][1].double(), value, rtol=2e-6, atol=2e-6)
    assert grad_policy.isfinite().all()
    assert grad_reference.isfinite().all()
    assert (grad_policy[1, ~support] == 0).all()
    again = call(policy, reference, labels, backend, without(UPSTREAM, "reverse_kl"))
    assert torch.equal(grad_policy[1], again[1][1])
    assert torch.equal(grad_reference[1], again[2][1])


@with_backends
@with_dtypes
@with_places
def test_hole_in_the_reference(place, dtype, backend):
    """log Z and KL(pi, rho) are infinite, H(q) NaN, and none passes a gradient; the rest is finite."""
    policy, reference, labels, support = rows_with(place, dtype, None, -INF)
    values, grad_policy, grad_reference = call(policy, reference, labels, backend, UPSTREAM)
    assert values["token_did_log_partition"][1] == INF
    assert values["kl"][1] == INF
    assert values["token_did_entropy"][1].isnan()
    z, r = policy.detach()[1].double(), reference.detach()[1].double()
    log_pi, log_rho = z.log_softmax(-1), r.log_softmax(-1)
    expected = {
        "policy_logprob": log_pi[labels[1]],
        "reference_logprob": log_rho[labels[1]],
        "policy_entropy": torch.distributions.Categorical(logits=z).entropy(),
        "reference_entropy": torch.distributions.Categorical(logits=r[support]).entropy(),
        "reverse_kl": (log_rho.exp() * (log_rho - log_pi))[support].sum(),
    }
    for name, value in expected.items():  # float32's rounding of logits near 10
        torch.testing.assert_close(values[name][1].double(), value, rtol=2e-6, atol=2e-6)
    assert grad_policy.isfinite().all()
    assert grad_reference.isfinite().all()
    assert (grad_reference[1, ~support] == 0).all()
    finite_only = without(UPSTREAM, "token_did_log_partition", "kl", "token_did_entropy")
    again = call(policy, reference, labels, backend, finite_only)
    assert torch.equal(grad_policy[1], again[1][1])
    assert torch.equal(grad_reference[1], again[2][1])


@with_dtypes
@with_places
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_gradients_with_a_hole_on_one_side(side, place, dtype):
    """The fused gradients against float64 autograd through the reference, which the two tests above judge by value."""
    policy, reference, labels, _ = rows_with(place, dtype, *((-INF, None) if side == "policy" else (None, -INF)))
    _, *ours = call(policy, reference, labels, "fused", UPSTREAM)
    exact = tuple(x.detach().double().requires_grad_() for x in (policy, reference))
    _, *expected = call(*exact, labels, "reference", UPSTREAM)
    # Half a unit of the gradient's own dtype, and float32's arithmetic on gradients that are at most 30.
    rtol = {"f32": 1e-5, "bf16": 2**-8, "f64": 1e-11}[dtype]
    atol = 1e-12 if dtype == "f64" else 1e-5
    for grad, exact_grad in zip(ours, expected, strict=True):
        assert exact_grad.abs().max() < 30
        torch.testing.assert_close(grad[1].double(), exact_grad[1], rtol=rtol, atol=atol)


@with_backends
@with_dtypes
@pytest.mark.parametrize("place", ["one-in-a-vector", "one-in-the-tail", "vectors-and-tail", "two-splits"])
def test_label_on_a_hole(place, dtype, backend):
    """The label's log-probability is -inf on the side with the hole; its gradient still is onehot - softmax."""
    policy, reference, labels, support = rows_with(place, dtype, -INF, None)
    labels[1] = (~support).nonzero()[0, 0]
    values, *_ = call(policy, reference, labels, backend, UPSTREAM)
    assert values["policy_logprob"][1] == -INF
    assert values["reference_logprob"][1].isfinite()
    (grad,) = torch.autograd.grad(
        token_statistics(policy, reference, labels, backend=backend).policy_logprob.sum(), policy
    )
    expected = -policy.detach()[1].double().softmax(-1)
    expected[labels[1]] += 1
    # Rounded to the gradient's dtype; the probabilities are right to float32.
    tolerance = {"rtol": 2**-8 if dtype == "bf16" else 1e-5, "atol": 1e-7}
    torch.testing.assert_close(grad[1].double(), expected, **tolerance)


@with_backends
@with_dtypes
@with_places
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
def test_invalid_row(side, value, place, dtype, backend):
    """NaN and +inf, alone or in any number, make their row NaN and leave its neighbours' bits alone."""
    sides = (value if side != "reference" else None, value if side != "policy" else None)
    policy, reference, labels, _ = rows_with(place, dtype, *sides)
    assert_only_the_middle_row_is_nan(policy, reference, labels, backend)


@with_backends
@with_places
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_nan_with_a_payload(side, place, backend):
    """Integer arithmetic on such bits may give those of a number."""
    policy, reference, labels, support = rows_with(place, "f32", None, None)
    bits = torch.tensor(-0x3FFFFF, dtype=torch.int32)
    (policy if side == "policy" else reference).data.view(torch.int32)[1, ~support] = bits
    assert_only_the_middle_row_is_nan(policy, reference, labels, backend)


@with_backends
@with_dtypes
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("side", ["policy", "reference"])
@pytest.mark.parametrize(
    ("place", "entry"),
    [("the-first-block", 3), ("the-first-split", 600), ("the-first-split", SPLIT - 1), ("the-last-split", SPLIT + 900)],
)
def test_invalid_entry_among_holes(place, entry, side, value, dtype, backend):
    """An invalid entry in a block or split of holes: there is no maximum yet that it could be measured against."""
    policy, reference, labels, _ = rows_with(place, dtype, -INF, -INF)
    (policy if side == "policy" else reference).data[1, entry] = value
    assert_only_the_middle_row_is_nan(policy, reference, labels, backend)


@with_backends
@with_dtypes
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
@pytest.mark.parametrize("vocabulary", [5, 16, 530, 2 * SPLIT + 5])
def test_side_without_support(vocabulary, side, dtype, backend):
    generator = torch.Generator().manual_seed(5)
    policy, reference = (torch.randn(3, vocabulary, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    if side != "reference":
        policy[1] = -INF
    if side != "policy":
        reference[1] = -INF
    labels = torch.tensor([0, 1, 2])
    assert_only_the_middle_row_is_nan(policy.requires_grad_(), reference.requires_grad_(), labels, backend)


def assert_only_the_middle_row_is_nan(policy, reference, labels, backend):
    values, *grads = call(policy, reference, labels, backend, UPSTREAM)
    around = torch.tensor([0, 2])
    alone = tuple(x.detach()[around].requires_grad_() for x in (policy, reference))
    values_around, *grads_around = call(*alone, labels[around], backend, UPSTREAM[:, around])
    for name, value in values.items():
        assert value[1].isnan(), name
        assert torch.equal(value[around], values_around[name]), name
    for grad, grad_around in zip(grads, grads_around, strict=True):
        assert grad[1].isnan().all()
        assert torch.equal(grad[around], grad_around)


@with_backends
@with_dtypes
@pytest.mark.parametrize("vocabulary", [4, 40, 1200, 2 * SPLIT])
def test_disjoint_supports(vocabulary, dtype, backend):
    """No entry in common: both divergences and log Z are infinite, H(q) NaN; what one side says alone stays."""
    half = vocabulary // 2
    policy, reference = torch.zeros(2, vocabulary, dtype=DTYPES[dtype]), torch.zeros(2, vocabulary, dtype=DTYPES[dtype])
    policy[:, :half] = -INF
    reference[:, half:] = -INF
    labels = torch.tensor([0, vocabulary - 1])
    values, *grads = call(policy.requires_grad_(), reference.requires_grad_(), labels, backend, UPSTREAM[:, :2])
    for name in ("token_did_log_partition", "kl", "reverse_kl"):
        assert (values[name] == INF).all(), name
    assert values["token_did_entropy"].isnan().all()
    uniform = torch.full((2,), half, dtype=values["kl"].dtype).log()
    torch.testing.assert_close(values["policy_entropy"], uniform)
    torch.testing.assert_close(values["reference_entropy"], uniform)
    torch.testing.assert_close(values["policy_logprob"], torch.stack([-INF * uniform[0], -uniform[0]]))
    torch.testing.assert_close(values["reference_logprob"], torch.stack([-uniform[0], -INF * uniform[0]]))
    for grad in grads:
        assert grad.isfinite().all()


@with_backends
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_moderate_mask_on_both_sides_is_an_entry(dtype, backend):
    """-1e4 is a logit like any other: weight 0 in both models, 1 in their ratio."""
    policy, reference, labels, support = rows_with("vectors-and-tail", dtype, -1e4, -1e4)
    values, *grads = call(policy, reference, labels, backend, UPSTREAM)
    inside = tuple(x.detach()[1:2, support].double() for x in (policy, reference))
    expected = naive(*inside, support[: labels[1]].sum()[None])
    for name in ("policy_logprob", "reference_logprob", "policy_entropy", "reference_entropy", "kl", "reverse_kl"):
        value = expected[FIELDS.index(name)][0]
        torch.testing.assert_close(values[name][1].double(), value, rtol=2e-6, atol=2e-6)
    with_masked = torch.cat([inside[0] - inside[1], torch.zeros(1, int((~support).sum()))], -1)
    entropy = torch.distributions.Categorical(logits=with_masked).entropy()[0]
    torch.testing.assert_close(values["token_did_entropy"][1].double(), entropy, rtol=2e-6, atol=2e-6)
    for grad in grads:
        assert grad.isfinite().all()


@with_backends
@pytest.mark.parametrize("mask", [-1e9, -1e30, -1e37, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("place", ["vectors-and-tail", "a-later-block"])
def test_large_mask_is_minus_infinity(place, dtype, sides, mask, backend):
    """Beyond 1e6 a logit counts as infinite, on either side: equal to the bit to -inf in its place."""
    results = []
    for value in (mask, -torch.inf):
        fill = [value if side else 0.5 for side in sides]
        results.append(call(*rows_with(place, dtype, *fill)[:3], backend, UPSTREAM))
    (masked, *masked_grads), (infinite, *infinite_grads) = results
    for name in FIELDS:
        assert torch.equal(masked[name].nan_to_num(nan=7e7), infinite[name].nan_to_num(nan=7e7)), name
    for a, b in zip(masked_grads, infinite_grads, strict=True):
        assert torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7))


@with_backends
@pytest.mark.parametrize("offset", [-999_960, 999_960])
def test_logits_near_the_limit(offset, backend):
    """Finite logits that are nearer to infinite ones than their weights can tell."""
    results = []
    for value in (-1_000_030, -INF) if offset < 0 else (1_000_030, INF):
        policy, reference, labels, support = rows_with("a-later-block", "f32", None, None)
        policy.data[1] += offset
        policy.data[1, ~support] = value
        results.append(call(policy, reference, labels, backend, UPSTREAM)[0])
    for name in FIELDS:
        assert torch.equal(results[0][name].nan_to_num(nan=7e7), results[1][name].nan_to_num(nan=7e7)), name


@with_dtypes
def test_common_entries_far_below_come_first(dtype):
    """The largest policy logit stands where the reference has a hole: differences begin far below log-ratios."""
    policy, reference, labels, _ = rows_with("a-later-block", dtype, None, None)
    policy.data[1, :1024], reference.data[1, :1024] = -2e5, 20
    policy.data[1, 0], reference.data[1, 0] = 20, -INF
    upstream = without(UPSTREAM, *FIELDS[2:5], "kl", "reverse_kl")  # the others are of order 1
    _, *ours = call(policy, reference, labels, "fused", upstream)
    exact = tuple(x.detach().double().requires_grad_() for x in (policy, reference))
    _, *expected = call(*exact, labels, "reference", upstream)
    for grad, exact_grad in zip(ours, expected, strict=True):
        rtol = 2**-8 if dtype == "bf16" else 1e-5
        torch.testing.assert_close(grad[1].double(), exact_grad[1], rtol=rtol, atol=1e-5 * exact_grad.abs().max())


@with_backends
@pytest.mark.parametrize("place", ["vectors-and-tail", "a-later-block"])
def test_huge_positive_logit_is_plus_infinity(place, backend):
    policy, reference, labels, _ = rows_with(place, "f32", 2e6, 0.5)
    values, *_ = call(policy, reference, labels, backend, UPSTREAM)
    assert all(values[name][1].isnan() for name in FIELDS)


@pytest.mark.parametrize("sign", [1, -1])
def test_label_at_the_limit_counts_as_the_entries_do(sign):
    """Where rounding to float32 decides whether a logit is finite, its log-probability agrees with the row."""
    policy = torch.full((1, 20), 690000.0625) * sign
    statistics = token_statistics(policy, torch.zeros(1, 20), torch.tensor([3]), temperature=0.69, backend="fused")
    assert statistics.policy_logprob.isfinite() == statistics.policy_entropy.isfinite()
