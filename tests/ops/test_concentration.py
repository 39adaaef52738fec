"""token_did_concentration: log(size of the support) less the token DID's entropy, in every path that computes it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lit_did import linear_token_statistics, sequence_statistics, token_statistics
from lit_did.functional import token_did_concentration
from lit_did.metrics import TokenDIDConcentration
from lit_did.ops.partials import NO_LABEL, Partials
from tests.helpers import DTYPES, random_logits

INF = torch.inf
# Beyond one split of a row, with whole vectors and a tail.
VOCABULARY = 16384 + 533
MASKED = {
    "none": [],
    "one": [7],
    "in the tail": [VOCABULARY - 1, VOCABULARY - 2],
    "whole blocks": range(100, 3000),
    "a split and more": range(16000, VOCABULARY - 3),
}


def masked_logits(entries, sides, dtype="f32", rows=3):
    policy, reference, labels = random_logits(rows, VOCABULARY, DTYPES[dtype], DTYPES[dtype])
    for side, logits in (("policy", policy), ("reference", reference)):
        if side in sides:
            logits[1, list(entries)] = -INF
    labels[:] = 3
    return policy, reference, labels


def expected(policy, reference):
    """Counts the support and sums over it, row by row, in float64."""
    values = []
    for z, r in zip(policy.double(), reference.double(), strict=True):
        support = (z > -INF) | (r > -INF)
        log_q = (z - r)[support].log_softmax(-1)
        entropy = -(log_q.exp() * log_q.masked_fill(log_q == -INF, 0)).sum()
        values.append(math.log(int(support.sum())) - entropy)
    return torch.stack(values)


def in_tiles(policy, reference, labels):
    """Through a layer of one input a side: its weights are the logits."""
    rows = [
        linear_token_statistics(one, z[:, None], one, r[:, None], y[None], max_extra_bytes=2**14)
        for one, z, r, y in zip(
            torch.ones(len(labels), 1, 1, dtype=policy.dtype), policy, reference, labels, strict=True
        )
    ]
    return torch.cat([row.token_did_concentration for row in rows])


def in_slices(policy, reference, labels):
    """As ranks with a slice of the vocabulary each merge them."""
    cuts = [0, 8, 3000, 16000, VOCABULARY]
    partials = Partials(labels, NO_LABEL, 1.0, entries=len(cuts), block=1, slice_entries=1)
    partials.slice_entries = VOCABULARY  # the blocks differ
    for begin, end in itertools.pairwise(cuts):
        partials.begin_block(end - begin)
        partials.add(policy[:, begin:end], reference[:, begin:end], slice(None), begin)
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    return partials.finish(dtype)[0].token_did_concentration


PATHS = {
    "fused": lambda *inputs: token_statistics(*inputs, backend="fused").token_did_concentration,
    "reference": lambda *inputs: token_statistics(*inputs, backend="reference").token_did_concentration,
    "sequences": lambda policy, reference, labels: (
        sequence_statistics(policy[:, None], reference[:, None], labels[:, None]).token_did_concentration
    ),
    "slices": in_slices,
}
with_paths = pytest.mark.parametrize("path", PATHS)


@with_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", ["policy", "policy and reference"])
@pytest.mark.parametrize("entries", MASKED)
def test_masked_entries_are_counted(entries, sides, dtype, path):
    """An entry that is -inf on both sides leaves the support. One that is -inf in the policy alone stays."""
    inputs = masked_logits(MASKED[entries], sides, dtype)
    tolerance = 1e-12 if dtype == "f64" else 1e-5  # plain torch adds up in float32
    torch.testing.assert_close(PATHS[path](*inputs).double(), expected(*inputs[:2]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sides", ["policy", "policy and reference"])
@pytest.mark.parametrize("entries", MASKED)
def test_masked_entries_are_counted_in_tiles(entries, sides):
    policy, reference, labels = masked_logits(MASKED[entries], sides)
    policy, reference = (x.clamp(min=-1e9) for x in (policy, reference))  # 1 * -inf is NaN where it meets 0
    values = in_tiles(policy, reference, labels)
    policy, reference = (x.masked_fill(x < -1e6, -INF) for x in (policy, reference))
    torch.testing.assert_close(values.double(), expected(policy, reference), rtol=0, atol=3e-6)


@with_paths
def test_nan_where_the_entropy_is(path):
    values = PATHS[path](*masked_logits([7], "reference"))
    assert values.isnan().tolist() == [False, True, False]


@with_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", ["none", "whole blocks", "a split and more"])
def test_0_where_the_policy_is_its_reference(entries, dtype, path):
    policy, _, labels = masked_logits(MASKED[entries], "policy", dtype)
    values = PATHS[path](policy, policy.clone(), labels)
    assert not values.signbit().any()
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=2e-6 if path == "reference" else 1e-12)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_gradient_is_minus_that_of_the_entropy(backend):
    policy, reference, labels = masked_logits([5, 6], "policy and reference", "f64")
    inputs = policy.requires_grad_(), reference.requires_grad_()
    statistics = token_statistics(*inputs, labels, backend=backend)
    grads = [
        torch.autograd.grad(value.sum(), inputs, retain_graph=True)
        for value in (statistics.token_did_concentration, -statistics.token_did_entropy)
    ]
    for ours, opposite in zip(*grads, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, opposite, rtol=1e-12, atol=1e-15)


def test_mean_over_tokens():
    policy, reference, labels = masked_logits(range(50), "policy and reference")
    labels[0] = -100
    mean = expected(policy, reference)[1:].mean()
    value = token_did_concentration(policy[None], reference[None], labels[None])
    torch.testing.assert_close(value, mean, rtol=0, atol=3e-6)
    metric = TokenDIDConcentration(unit="bits")
    metric.update(policy[None, :2], reference[None, :2], labels[None, :2])
    metric.update(policy[None, 2:], reference[None, 2:], labels[None, 2:])
    torch.testing.assert_close(metric.compute(), mean / math.log(2), rtol=0, atol=4e-6)
