"""The reduction over sequences: exact sums in Python, the reference's gradients, the same bits in every layout."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from lit_did import SequenceStatistics, TokenStatistics, sequence_statistics
from lit_did.ops import sequence_reduction
from lit_did.ops.fused import _reduction_backward
from lit_did.ops.sequence_statistics import _reference_reduction
from tests.helpers import DTYPES, random_logits

OFFSETS = [0, 0, 5, 5, 6, 11, 24]  # empty sequences first and within, one token, and more
TOKENS = OFFSETS[-1]
MEANS = ("token_did_entropy", "token_did_concentration", "policy_entropy", "reference_entropy", "kl", "reverse_kl")


def fused_reduction(statistics, labels, cu_seqlens=None, ignore_index=-100):
    return SequenceStatistics(*torch.ops.lit_did.sequence_reduction(list(statistics), labels, cu_seqlens, ignore_index))


def random_statistics(shape=(TOKENS,), dtype=torch.float32, seed=0):
    """Nine statistics of sizes from 1e-3 to 1e3, and labels; a third ignored, all of the tokens 6 to 10 included."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(9, *shape, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    statistics = (sizes * torch.randn(9, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(50, shape, generator=generator)
    labels.view(-1)[::3] = -100
    labels.view(-1)[6:11] = -100
    return TokenStatistics(*statistics), labels


def exactly(statistics, labels, sequences, ignore_index=-100):
    """{field: one number a sequence}, each sum rounded once."""
    result = {name: [] for name in SequenceStatistics._fields}
    for tokens in sequences:
        kept = [t for t in tokens if labels[t] != ignore_index]
        terms = {name: [values[t].item() for t in kept] for name, values in statistics._asdict().items()}
        pairs = zip(terms["policy_logprob"], terms["reference_logprob"], strict=True)
        terms["log_ratio"] = [policy - reference for policy, reference in pairs]
        for name, values in terms.items():
            result[name].append(math.fsum(values) / (max(len(kept), 1) if name in MEANS else 1))
        result["num_tokens"].append(len(kept))
    return result


def check_values(ours, expected, dtype):
    """Within one rounding of the exact sum: the terms are added in float64."""
    close = {"rtol": 1e-13, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2**-24, "atol": 1e-10}
    for name, value in ours._asdict().items():
        assert value.dtype == (torch.int64 if name == "num_tokens" else dtype)
        of_loop = torch.tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(value.double().flatten(), of_loop, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_values(dtype):
    statistics, labels = random_statistics(dtype=dtype)
    sequences = [range(a, b) for a, b in itertools.pairwise(OFFSETS)]
    expected = exactly(statistics, labels, sequences)
    assert expected["num_tokens"][:5] == [0, 3, 0, 1, 0]
    check_values(fused_reduction(statistics, labels, torch.tensor(OFFSETS)), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (24, 1)], ids=str)
def test_padded_values(shape, dtype):
    statistics, labels = random_statistics(shape, dtype)
    flat = TokenStatistics(*(value.flatten() for value in statistics))
    expected = exactly(flat, labels.flatten(), torch.arange(TOKENS).view(-1, shape[-1]).tolist())
    ours = fused_reduction(statistics, labels)
    assert ours.kl.shape == shape[:-1]
    check_values(ours, expected, dtype)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 3, 3, 10])], ids=["padded", "packed"])
def test_ignored_tokens_are_not_read(cu_seqlens):
    """Nor have they any gradient, whatever their statistics and their sequence's gradient hold."""
    statistics, labels = random_statistics((10,))
    labels[[1, 4, 8, 9]] = 7
    expected = fused_reduction(statistics, labels, cu_seqlens, ignore_index=7)
    for value in statistics:
        value[labels == 7] = torch.nan
    statistics = [value.requires_grad_() for value in statistics]
    ours = fused_reduction(statistics, labels, cu_seqlens, ignore_index=7)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    loss = torch.inf * sum(value.sum() for value in ours[:-1])
    for grad in torch.autograd.grad(loss, statistics):
        assert (grad[labels == 7] == 0).all()
        assert (grad[labels != 7].abs() == torch.inf).all() or grad[labels != 7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts_have_the_same_bits(dtype):
    """Packed, padded on either side, strided, alone: a sequence's own labelled tokens decide."""
    statistics, labels = random_statistics(dtype=dtype)
    packed = fused_reduction(statistics, labels, torch.tensor(OFFSETS))
    longest = max(b - a for a, b in itertools.pairwise(OFFSETS))
    for left in (False, True):
        rows = torch.full((len(OFFSETS) - 1, longest), -100)
        padded = torch.full((9, *rows.shape), torch.nan, dtype=dtype)
        for i, (a, b) in enumerate(itertools.pairwise(OFFSETS)):
            where = slice(longest - (b - a), longest) if left else slice(b - a)
            rows[i, where] = labels[a:b]
            padded[:, i, where] = torch.stack(statistics)[:, a:b]
        ours = fused_reduction(padded, rows)
        assert all(torch.equal(a, b) for a, b in zip(ours, packed, strict=True))
        ours = fused_reduction(padded.transpose(1, 2).contiguous().transpose(1, 2), rows.t().contiguous().t())
        assert all(torch.equal(a, b) for a, b in zip(ours, packed, strict=True))
    for i, (a, b) in enumerate(itertools.pairwise(OFFSETS)):
        alone = fused_reduction([value[a:b] for value in statistics], labels[a:b])
        assert all(torch.equal(one, many[i]) for one, many in zip(alone, packed, strict=True))


def test_public_function_has_the_same_bits_in_both_layouts():
    policy, reference, labels = random_logits(12, 37, torch.bfloat16, torch.float32)
    labels[[0, 5]] = -100
    inputs = (policy.requires_grad_(), reference.requires_grad_())
    packed = sequence_statistics(*inputs, labels, cu_seqlens=torch.arange(0, 13, 4))
    padded = sequence_statistics(*(x.view(3, 4, -1) for x in inputs), labels.view(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(packed, padded, strict=True))
    grads = [torch.autograd.grad(sum(v.sum() for v in ours[:-1]), inputs) for ours in (packed, padded)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ----------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------


def layouts():
    return {"packed": ((TOKENS,), torch.tensor(OFFSETS)), "padded": ((4, 6), None), "one": ((TOKENS,), None)}


@pytest.mark.parametrize("used", [range(10), (2,), (0, 2), (1,), (3, 9), (4, 5, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", layouts())
def test_gradients(layout, dtype, used):
    """A statistic that no used field reads gets no gradient at all, so that its share of the next backward is saved."""
    shape, cu_seqlens = layouts()[layout]
    statistics, labels = random_statistics(shape, dtype)
    generator = torch.Generator().manual_seed(5)
    grads = []
    for reduction in (fused_reduction, _reference_reduction):
        leaves = [value.detach().requires_grad_() for value in statistics]
        sequences = reduction(TokenStatistics(*leaves), labels, cu_seqlens, -100)
        upstream = [torch.randn(sequences[0].shape, generator=generator.manual_seed(i), dtype=dtype) for i in used]
        loss = sum((sequences[i] * u).sum() for i, u in zip(used, upstream, strict=True))
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for ours, expected in zip(*grads, strict=True):
        if expected is None or (expected == 0).all():
            assert ours is None
            continue
        torch.testing.assert_close(ours, torch.where(labels == -100, 0, expected), rtol=3e-7, atol=1e-12)
        assert (ours[labels == -100] == 0).all()


@pytest.mark.parametrize("layout", layouts())
def test_gradcheck(layout):
    shape, cu_seqlens = layouts()[layout]
    statistics, labels = random_statistics(shape, torch.float64)
    # An ignored token's statistics are constants in the fields, so that numerical differences there are 0.
    leaves = [(value / 100).requires_grad_() for value in statistics]
    torch.autograd.gradcheck(lambda *xs: fused_reduction(xs, labels, cu_seqlens)[:-1], leaves)


def test_differentiable_again():
    """It is linear: its gradient passes gradients on."""
    statistics, labels = random_statistics(dtype=torch.float64)
    leaves = [value.requires_grad_() for value in statistics]
    ours = fused_reduction(leaves, labels, torch.tensor(OFFSETS))
    (grad,) = torch.autograd.grad(ours.log_ratio.square().sum(), leaves[0], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaves[0])
    kept = (labels != -100).double()
    tokens = torch.tensor([[a <= t < b for a, b in itertools.pairwise(OFFSETS)] for t in range(TOKENS)]).double()
    torch.testing.assert_close(second, 2 * kept * (tokens @ tokens.T @ kept))


# ----------------------------------------------------------------------------------------------------------
# Bad calls, and PyTorch's tools
# ----------------------------------------------------------------------------------------------------------

LABELS = torch.zeros(6, dtype=torch.long)
VALUES = [torch.zeros(6)] * 9


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"statistics": VALUES[1:]}, RuntimeError, "nine `statistics`"),
        ({"statistics": [x.bfloat16() for x in VALUES]}, RuntimeError, "`statistics` of float32 or float64"),
        ({"statistics": [*VALUES[1:], VALUES[0].double()]}, RuntimeError, "`statistics` of one dtype"),
        ({"statistics": [*VALUES[1:], VALUES[0][:5]]}, RuntimeError, "`statistics` of the shape of `labels`"),
        ({"labels": LABELS.int()}, RuntimeError, "`labels` of int64"),
        ({"labels": LABELS[0], "statistics": [x[0] for x in VALUES]}, RuntimeError, r"`labels` of shape \[..., T\]"),
        (
            {"labels": LABELS.view(2, 3), "statistics": [x.view(2, 3) for x in VALUES]},
            RuntimeError,
            r"`labels` of shape \[tokens\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 6]).int()}, RuntimeError, "`cu_seqlens` of int64"),
        ({"cu_seqlens": torch.tensor(6)}, RuntimeError, r"`cu_seqlens` of shape \[sequences \+ 1\]"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.long)}, RuntimeError, "`cu_seqlens` of shape"),
        ({"cu_seqlens": torch.tensor([1, 6])}, RuntimeError, "`cu_seqlens` that rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 7])}, RuntimeError, "`cu_seqlens` that rise"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, RuntimeError, "`cu_seqlens` that rise"),
        ({"cu_seqlens": torch.tensor([0, -3, 6])}, RuntimeError, "`cu_seqlens` that rise"),
        ({"cu_seqlens": torch.tensor([0])}, RuntimeError, "`cu_seqlens` that rise"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_operator_call(changed, error, message):
    good = {"statistics": VALUES, "labels": LABELS, "cu_seqlens": torch.tensor([0, 6]), "ignore_index": -100}
    torch.ops.lit_did.sequence_reduction(**good)
    with pytest.raises(error, match=message):
        torch.ops.lit_did.sequence_reduction(**good | changed)


@pytest.mark.parametrize("needs", [range(9), (0, 1), ()], ids=["all", "logprobs", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", layouts())
def test_opcheck(layout, dtype, needs):
    shape, cu_seqlens = layouts()[layout]
    statistics, labels = random_statistics(shape, dtype)
    arguments = ([value.requires_grad_(i in needs) for i, value in enumerate(statistics)], labels, cu_seqlens, -100)
    torch.library.opcheck(
        torch.ops.lit_did.sequence_reduction.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_bad_offsets_in_a_compiled_function():
    """Values that Python does not look at while compiling are checked by the kernel, whose errors are RuntimeErrors."""
    torch.compiler.reset()
    policy, reference, labels = random_logits(6, 20, DTYPES["f32"], DTYPES["f32"])
    compiled = torch.compile(sequence_statistics, fullgraph=True, backend="aot_eager")
    compiled(policy, reference, labels, cu_seqlens=torch.tensor([0, 4, 6]))
    with pytest.raises(RuntimeError, match="`cu_seqlens` that rise from 0"):
        compiled(policy, reference, labels, cu_seqlens=torch.tensor([0, 7, 6]))
    torch.compiler.reset()


def test_new_numbers_of_sequences_do_not_recompile():
    torch.compiler.reset()
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def loss(policy, reference, labels, offsets):
        statistics = sequence_statistics(policy, reference, labels, cu_seqlens=offsets)
        return statistics.log_ratio.sigmoid().sum() + statistics.kl.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counting, dynamic=True)
    for rows, offsets in ((8, [0, 3, 8]), (12, [0, 3, 8, 12]), (30, [0, 0, 10, 20, 30])):
        policy, reference, labels = random_logits(rows, 20, torch.float32, torch.float32)
        arguments = (policy.requires_grad_(), reference, labels, torch.tensor(offsets))
        ours, expected = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, policy), torch.autograd.grad(expected, policy))
    assert graphs == 1
    torch.compiler.reset()


def test_gradient_of_tokens_in_no_sequence():
    """Offsets that are not checked (on CUDA) may start late or stop short: tokens outside get a gradient of 0."""
    labels, offsets = torch.tensor([1, 1, -100, 1, 1, 1]), torch.tensor([1, 3, 3, 5])
    context = SimpleNamespace(saved_tensors=(labels, offsets, torch.tensor([1, 0, 2])), ignore_index=-100)
    gradient = torch.tensor([2.0, 3.0, 4.0])
    (of_policy_logprob, *_), *_ = _reduction_backward(
        context, gradient, *[None] * (len(SequenceStatistics._fields) - 1)
    )
    assert of_policy_logprob.tolist() == [0, 2, 0, 4, 4, 0]


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_statistics_at_hand(backend, packed):
    """The public function: also where more tokens are ignored than when the statistics were made."""
    statistics, labels = random_statistics()
    ignored = labels.masked_fill(torch.arange(TOKENS) % 5 == 1, -1).masked_fill(labels == -100, -1)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32) if packed else None
    ours = sequence_reduction(statistics, ignored, cu_seqlens=offsets, ignore_index=-1, backend=backend)
    sequences = [range(a, b) for a, b in itertools.pairwise(OFFSETS)] if packed else [range(TOKENS)]
    check_values(ours, exactly(statistics, ignored, sequences, ignore_index=-1), torch.float32)


AT_HAND, ITS_LABELS = random_statistics()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tokens": tuple(AT_HAND)}, TypeError, "`tokens` to be TokenStatistics, but got tuple"),
        ({"tokens": AT_HAND._replace(kl=AT_HAND.kl.half())}, TypeError, "`kl` to be float32, or float64"),
        ({"tokens": AT_HAND._replace(kl=AT_HAND.kl[:3])}, ValueError, r"`kl` to have the shape of `labels`"),
        ({"labels": [1]}, TypeError, "`labels` to be a tensor, but got list"),
        ({"labels": ITS_LABELS.float()}, TypeError, "`labels` to be integers"),
        ({"labels": torch.tensor(3)}, ValueError, r"`labels` to have shape \[..., T\], but got \(\)"),
        ({"ignore_index": 0.5}, TypeError, "`ignore_index` to be an integer"),
        ({"backend": "cuda"}, ValueError, "`backend` to be one of"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "to rise from 0 to the number of tokens, 24"),
        ({"cu_seqlens": torch.tensor([0.0])}, TypeError, "`cu_seqlens` to be an int32 or int64 tensor"),
        (
            {
                "tokens": TokenStatistics(*(value.view(2, -1) for value in AT_HAND)),
                "labels": ITS_LABELS.view(2, -1),
                "cu_seqlens": torch.tensor([0, 24]),
            },
            ValueError,
            r"`labels` to have shape \[tokens\] with `cu_seqlens`, but got \(2, 12\)",
        ),
    ],
)
def test_other_statistics_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        sequence_reduction(**{"tokens": AT_HAND, "labels": ITS_LABELS} | changed)
