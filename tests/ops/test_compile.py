"""The operators under PyTorch's tools: opcheck on schemas, fake kernels and gradients; torch.compile without breaks."""

from __future__ import annotations

import pytest
import torch

from lit_did import sequence_statistics, token_statistics
from tests.helpers import DTYPES, random_logits

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def sample_inputs():
    """Arguments of torch.ops.lit_did.token_statistics: dtypes, shapes and layouts that its fake kernel must foresee."""
    for shape, policy_dtype, reference_dtype, needs in [
        ((5,), "f32", "f32", (True, True)),
        ((2, 3), "bf16", "f32", (True, False)),
        ((2, 1, 3), "f16", "bf16", (False, True)),
        ((), "f64", "f64", (True, True)),
        ((4,), "bf16", "bf16", (False, False)),
    ]:
        rows = torch.Size(shape).numel()
        policy, reference, labels = random_logits(rows, 20, DTYPES[policy_dtype], DTYPES[reference_dtype])
        policy, reference = (
            x.view(*shape, 20).requires_grad_(n) for x, n in zip((policy, reference), needs, strict=True)
        )
        labels = labels.view(shape)
        if rows > 1:
            labels.view(-1)[1] = -100
        yield policy, reference, labels, -100, 0.9
    policy, reference, labels = random_logits(6, 20, torch.float32, torch.float32)
    transposed = (x.view(3, 2, 20).transpose(0, 1).detach().requires_grad_() for x in (policy, reference))
    yield *transposed, labels.view(2, 3), -100, 1.0


@pytest.mark.parametrize("sample", list(sample_inputs()), ids=lambda s: f"{tuple(s[0].shape)}-{s[0].dtype}")
def test_opcheck_forward(sample):
    torch.library.opcheck(torch.ops.lit_did.token_statistics.default, sample, test_utils=OPCHECKS)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("used", [(0, 1), (2,), range(9)], ids=["logprobs", "entropy", "all"])
def test_opcheck_backward(used, needs):
    policy, reference, labels, ignore_index, temperature = next(sample_inputs())
    policy, reference = policy.detach(), reference.detach()
    *statistics, normalizers = torch.ops.lit_did.token_statistics(policy, reference, labels, ignore_index, temperature)
    grads = [torch.randn(5) if i in used else None for i in range(9)]
    arguments = (grads, policy, reference, labels, statistics, normalizers, ignore_index, temperature, *needs)
    torch.library.opcheck(torch.ops.lit_did.token_statistics_backward.default, arguments, test_utils=OPCHECKS)


def token_loss(policy, reference, labels):
    statistics = token_statistics(policy, reference, labels, temperature=0.9)
    return statistics.log_ratio.sigmoid().sum() + statistics.token_did_entropy.sum() - 0.1 * statistics.kl.sum()


def packed_loss(policy, reference, labels):
    offsets = torch.arange(3) * (labels.shape[0] // 2)
    statistics = sequence_statistics(policy, reference, labels, cu_seqlens=offsets)
    return statistics.log_ratio.sigmoid().sum() + statistics.token_did_entropy.sum() + statistics.num_tokens.sum()


def padded_loss(policy, reference, labels):
    batch = (policy.unflatten(0, (-1, 2)), reference.unflatten(0, (-1, 2)), labels.unflatten(0, (-1, 2)))
    statistics = sequence_statistics(*batch)
    return statistics.log_ratio.sigmoid().sum() + statistics.kl.sum()


def value_and_grads(function, policy, reference, labels):
    inputs = (policy.detach().requires_grad_(), reference.detach().requires_grad_())
    loss = function(*inputs, labels)
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


@pytest.fixture(autouse=True)
def _no_compiled_leftovers():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("loss", [token_loss, packed_loss, padded_loss])
def test_compiled_equals_eager(loss, dtype):
    """fullgraph: nothing falls back to Python. aot_eager runs the same kernels, so the same bits but for sums."""
    batch = random_logits(8, 530, DTYPES[dtype], DTYPES[dtype])
    batch[2][3] = -100
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(value_and_grads(compiled, *batch), value_and_grads(loss, *batch), strict=True):
        torch.testing.assert_close(ours, expected)


def test_inductor():
    batch = random_logits(8, 530, torch.float32, torch.float32)
    try:
        compiled = value_and_grads(torch.compile(token_loss, fullgraph=True), *batch)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"torch.compile cannot build code on this machine: {str(error).splitlines()[0]}")
    for ours, expected in zip(compiled, value_and_grads(token_loss, *batch), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("loss", [token_loss, packed_loss, padded_loss])
def test_new_batch_sizes_do_not_recompile(loss):
    """One graph for all numbers of rows, once torch.compile knows that they vary."""
    compiled_frames = 0

    def counting(graph, inputs):
        nonlocal compiled_frames
        compiled_frames += 1
        return graph

    compiled = torch.compile(loss, fullgraph=True, backend=counting, dynamic=True)
    for rows in (8, 12, 30, 64):
        batch = random_logits(rows, 40, torch.float32, torch.float32)
        for ours, expected in zip(value_and_grads(compiled, *batch), value_and_grads(loss, *batch), strict=True):
            torch.testing.assert_close(ours, expected)
        assert compiled_frames == 1, f"recompiled for {rows} rows"


def test_new_temperatures():
    """An annealed temperature may cost recompilations but breaks nothing."""
    batch = random_logits(4, 40, torch.float32, torch.float32)
    compiled = torch.compile(
        lambda *args, temperature: token_statistics(*args, temperature=temperature).kl, fullgraph=True, backend="eager"
    )
    for temperature in (1.0, 0.9, 0.8, 2):
        expected = token_statistics(*batch, temperature=temperature).kl
        torch.testing.assert_close(compiled(*batch, temperature=temperature), expected)
