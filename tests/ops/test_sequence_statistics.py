"""sequence_statistics: sums and means over each sequence's labelled tokens, against a loop over them in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_did import SequenceStatistics, sequence_statistics, token_statistics
from tests.helpers import DTYPES, FIELDS, naive, random_logits

BACKENDS = ("fused", "reference")
SUMS = ("policy_logprob", "reference_logprob", "log_ratio", "token_did_log_partition")
MEANS = ("token_did_entropy", "token_did_concentration", "policy_entropy", "reference_entropy", "kl", "reverse_kl")
VOCABULARY = 37  # two vectors and a tail


def one_by_one(policy, reference, labels, sequences, ignore_index=-100, temperature=1.0):
    """{field: [sequences]} in float64, differentiable. `sequences`: the token indices of each."""
    rows = []
    for tokens in sequences:
        kept = [t for t in tokens if labels[t] != ignore_index]
        sums = dict.fromkeys((*FIELDS, "log_ratio"), policy.double()[:0].sum())
        for t in kept:
            token = naive(policy[t : t + 1].double(), reference[t : t + 1].double(), labels[t : t + 1], temperature)
            token = dict(zip(FIELDS, (v[0] for v in token), strict=True))
            token["log_ratio"] = token["policy_logprob"] - token["reference_logprob"]
            sums = {name: sums[name] + token[name] for name in sums}
        row = {name: sums[name] for name in SUMS} | {name: sums[name] / max(len(kept), 1) for name in MEANS}
        rows.append(row | {"num_tokens": torch.tensor(len(kept))})
    return {name: torch.stack([row[name] for row in rows]) for name in SequenceStatistics._fields}


def check(ours, expected, inputs, flat, dtype):
    """Every field and, for a random upstream, both gradients."""
    # float32: sums of up to 8 tokens of magnitude 20, each right to a few roundings. bfloat16 gradients: half a unit.
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == "f64" else {"rtol": 3e-6, "atol": 3e-6}
    for name, value in ours._asdict().items():
        of_loop = expected[name].view(value.shape)
        torch.testing.assert_close(value.to(of_loop.dtype), of_loop, **close, msg=lambda m, n=name: f"{n}: {m}")
        assert value.dtype == (
            torch.int64 if name == "num_tokens" else torch.float64 if dtype == "f64" else torch.float32
        )
    generator = torch.Generator().manual_seed(6)
    names = [*SUMS, *MEANS]
    upstream = [torch.randn(expected[n].shape, generator=generator, dtype=torch.float64) for n in names]
    loss = sum((getattr(ours, n).flatten() * u).sum() for n, u in zip(names, upstream, strict=True))
    loss_of_loop = sum((expected[n] * u).sum() for n, u in zip(names, upstream, strict=True))
    grads = torch.autograd.grad(loss, inputs)
    if dtype == "bf16":
        close = {"rtol": 2**-8, "atol": 1e-5}
    for grad, of_loop in zip(grads, torch.autograd.grad(loss_of_loop, flat), strict=True):
        torch.testing.assert_close(grad.flatten(0, -2).double(), of_loop, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 4), (4, 1)], ids=str)
def test_last_dimension(shape, dtype, backend):
    tokens = torch.Size(shape).numel()
    policy, reference, labels = random_logits(tokens, VOCABULARY, DTYPES[dtype], DTYPES[dtype])
    labels[1::3] = 7  # an ignore_index that is a token of the vocabulary
    sequences = torch.arange(tokens).view(-1, shape[-1]).tolist()
    flat = tuple(x.double().requires_grad_() for x in (policy, reference))
    expected = one_by_one(*flat, labels, sequences, ignore_index=7, temperature=1.3)
    inputs = tuple(x.view(*shape, -1).requires_grad_() for x in (policy, reference))
    ours = sequence_statistics(*inputs, labels.view(shape), ignore_index=7, temperature=1.3, backend=backend)
    assert ours.kl.shape == shape[:-1]
    check(ours, expected, inputs, flat, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 12], [0, 5, 12], [0, 0, 5, 5, 5, 11, 12, 12]], ids=str)
def test_packed(offsets, offsets_dtype, dtype, backend):
    """Empty sequences at the start, in the middle and at the end included."""
    policy, reference, labels = random_logits(12, VOCABULARY, DTYPES[dtype], DTYPES[dtype])
    labels[[0, 3, 11]] = -100
    sequences = [range(a, b) for a, b in itertools.pairwise(offsets)]
    flat = tuple(x.double().requires_grad_() for x in (policy, reference))
    expected = one_by_one(*flat, labels, sequences)
    inputs = tuple(x.requires_grad_() for x in (policy, reference))
    cu_seqlens = torch.tensor(offsets, dtype=offsets_dtype)
    ours = sequence_statistics(*inputs, labels, cu_seqlens=cu_seqlens, backend=backend)
    assert ours.num_tokens.tolist() == [sum(labels[t].item() != -100 for t in s) for s in sequences]
    check(ours, expected, inputs, flat, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_sequence_without_labels(packed, backend):
    """0 in every field and a gradient of 0, whatever its logits hold; its neighbour as if alone."""
    policy, reference, labels = random_logits(8, VOCABULARY, torch.float32, torch.float32)
    labels[:4] = -100
    policy[1, 3], reference[2] = torch.nan, torch.inf
    inputs = (policy.requires_grad_(), reference.requires_grad_())
    if packed:
        ours = sequence_statistics(*inputs, labels, cu_seqlens=torch.tensor([0, 4, 8]), backend=backend)
    else:
        ours = sequence_statistics(*(x.view(2, 4, -1) for x in inputs), labels.view(2, 4), backend=backend)
    alone = sequence_statistics(policy[4:], reference[4:], labels[4:], backend=backend)
    for value, expected in zip(ours, alone, strict=True):
        assert value[0] == 0
        torch.testing.assert_close(value[1], expected)
    for grad in torch.autograd.grad(sum(v.sum() for v in ours[:-1]), inputs):
        assert (grad[:4] == 0).all()
        assert grad[4:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend):
    policy, reference, labels = random_logits(6, VOCABULARY, torch.float32, torch.float32)
    policy, reference, labels = policy.view(2, 3, -1), reference.view(2, 3, -1), labels.view(2, 3)
    expected = sequence_statistics(policy, reference, labels, backend=backend)
    pad = torch.nn.functional.pad
    ours = sequence_statistics(
        pad(policy, (0, 0, 0, 5), value=torch.nan),
        pad(reference, (0, 0, 0, 5), value=torch.nan),
        pad(labels, (0, 5), value=-100),
        backend=backend,
    )
    for value, of_unpadded in zip(ours, expected, strict=True):
        assert torch.equal(value, of_unpadded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend):
    policy, reference, labels = random_logits(12, VOCABULARY, torch.bfloat16, torch.float32)
    packed = sequence_statistics(policy, reference, labels, cu_seqlens=torch.arange(0, 13, 4), backend=backend)
    rows = sequence_statistics(policy.view(3, 4, -1), reference.view(3, 4, -1), labels.view(3, 4), backend=backend)
    for value, expected in zip(packed, rows, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "offsets"), [((0,), None), ((3, 0), None), ((0, 3), None), ((0,), [0]), ((0,), [0, 0])]
)
def test_nothing(shape, offsets, backend):
    logits = torch.zeros(*shape, 5, requires_grad=True)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    ours = sequence_statistics(
        logits, logits, torch.zeros(shape, dtype=torch.long), cu_seqlens=cu_seqlens, backend=backend
    )
    for value in ours:
        assert value.shape == (shape[:-1] if offsets is None else (len(offsets) - 1,))
        assert (value == 0).all()
    (grad,) = torch.autograd.grad(ours.kl.sum(), logits)
    assert grad.shape == logits.shape


def test_labels_of_a_narrow_dtype():
    """-100 is 156 to an eight-bit comparison: the token 156 must count all the same."""
    logits = torch.zeros(2, 200)
    ours = sequence_statistics(logits, logits, torch.tensor([156, 3], dtype=torch.uint8))
    assert ours.num_tokens == 2


def test_many_small_terms_beside_a_large_one():
    """Sums over tokens are taken in float64: 4,096 terms of 1e-4 beside one of -400 are lost in no rounding."""
    tokens = 4097
    policy = torch.zeros(tokens, 2)
    policy[:, 1] = -9.21034  # log pi(0) = -1.0e-4
    policy[0] = torch.tensor([0.0, 400.0])
    inputs = (policy, torch.zeros(tokens, 2), torch.zeros(tokens, dtype=torch.long))
    terms = token_statistics(*inputs).policy_logprob
    expected = terms.double().sum().item()
    assert abs(expected + 400.41) < 2e-3  # equal terms are off alike: by 2^-22 each on CUDA, 1e-3 in all
    assert abs(terms.numpy().cumsum()[-1] - expected) > 1e-2, "float32 would have done"
    assert abs(sequence_statistics(*inputs).policy_logprob - expected) <= torch.finfo(torch.float32).eps * 400


# ----------------------------------------------------------------------------------------------------------
# Errors of its own; those that it shares with token_statistics are in test_errors.py
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([1, 6], ValueError, r"Expected `cu_seqlens` to rise from 0 to the number of tokens, 6, but got \[1, 6\]"),
        ([0, 5], ValueError, r"`cu_seqlens` to rise .* 6, but got \[0, 5\]"),
        ([0, 7], ValueError, r"`cu_seqlens` to rise .* 6, but got \[0, 7\]"),
        ([0, 4, 2, 6], ValueError, r"`cu_seqlens` to rise .* but got \[0, 4, 2, 6\]"),
        ([0, -1, 6], ValueError, r"`cu_seqlens` to rise .* but got \[0, -1, 6\]"),
        ([0], ValueError, r"`cu_seqlens` to rise .* but got \[0\]"),
        ([], ValueError, r"Expected `cu_seqlens` to have shape \[sequences \+ 1\], but got \(0,\)"),
        ([[0, 6]], ValueError, r"Expected `cu_seqlens` to have shape \[sequences \+ 1\], but got \(1, 2\)"),
        ([0.0, 6.0], TypeError, r"Expected `cu_seqlens` to be an int32 or int64 tensor, but got torch.float32"),
    ],
    ids=str,
)
def test_bad_offsets(offsets, error, message, backend):
    logits, labels = torch.zeros(6, 5), torch.zeros(6, dtype=torch.long)
    offsets = torch.tensor(offsets, dtype=None if offsets else torch.long)
    with pytest.raises(error, match=message):
        sequence_statistics(logits, logits, labels, cu_seqlens=offsets, backend=backend)


def test_other_bad_layouts():
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"Expected `cu_seqlens` to be an int32 or int64 tensor, but got list"):
        sequence_statistics(logits[0], logits[0], labels[0], cu_seqlens=[0, 3])
    with pytest.raises(ValueError, match=r"`policy_logits` to have shape \[tokens, V\] with `cu_seqlens`.*\(2, 3, 5\)"):
        sequence_statistics(logits, logits, labels, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"`cu_seqlens` on the device of `policy_logits`, cpu, but got meta"):
        sequence_statistics(logits[0], logits[0], labels[0], cu_seqlens=torch.tensor([0, 3], device="meta"))
    with pytest.raises(ValueError, match=r"Expected `labels` to have shape \[..., T\], but got \(\)"):
        sequence_statistics(logits[0, 0], logits[0, 0], labels[0, 0])
