"""Attention of packed rows on a GPU: the real kernels against those of the CPU in float64, and what the host waits for.

`make gpu` runs these. Without a CUDA device all are skipped.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from lit_did.batches.sequences import read_sequences
from lit_did.models import varlen
from lit_did.models.loading import checkpoint_activations
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.trial import attention_used, layout_of
from tests.models import flash  # noqa: F401  its kernels for the CPU are the truth
from tests.models.architectures import build, logits_alone, logits_in, make_batch
from tests.models.test_attention import SEGMENTS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = torch.device("cuda")
KERNELS = varlen.kernels(DEVICE)
SIZES = {"hidden_size": 256, "head_dim": 64}


def test_which_kernel_is_tried_first():
    print(f"kernels: {KERNELS or varlen.without_kernels(DEVICE)}")
    if varlen._of_torch() is not None and torch.cuda.get_device_capability() >= (8, 0):
        assert KERNELS


@pytest.mark.skipif(varlen._of_torch() is None, reason="The truth is torch's function with a kernel for the CPU.")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 7, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", varlen.HALF)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_kernel(kernel, sliding_window, heads, dtype, dim):
    """Of queries whose keys begin with those of a shared prompt too."""
    torch.manual_seed(0)
    tokens, segments = sum(length for length, _ in SEGMENTS), torch.tensor(SEGMENTS)[None, None]
    given = [torch.randn(1, n, tokens, dim, dtype=dtype, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
    there = [x.detach().to(DEVICE).requires_grad_() for x in given]
    upstream = torch.randn(1, tokens, heads[0], dim, dtype=dtype)
    results = []
    for inputs, chosen in ((given, varlen.TORCH), (there, kernel)):
        own = segments.clone()
        varlen.prepare(own, inputs[0].device, chosen)
        output = varlen.attend(*inputs, varlen.lengths_of(own), sliding_window=sliding_window, scaling=0.1)
        gradients = torch.autograd.grad(output, inputs, upstream.to(inputs[0].device))
        results.append([x.detach().cpu().float() for x in (output, *gradients)])
    for truth, result in zip(*results, strict=True):
        torch.testing.assert_close(result, truth, rtol=0.02, atol=0.02 * truth.abs().max().item())


@pytest.mark.skipif(not KERNELS, reason="has no kernel that takes all sequences in one call")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "Gemma3Text"])
@pytest.mark.parametrize("mixed", [False, True])
def test_models(name, mixed):
    """One call a layer, without a warning, in bfloat16 weights or under autocast."""
    model = build(name, "sdpa", **SIZES)
    sequences = read_sequences(make_batch())
    with torch.no_grad():
        expected = torch.cat(logits_alone(model, sequences))
    model = model.to(DEVICE) if mixed else model.to(DEVICE, torch.bfloat16)
    with warnings.catch_warnings(), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        warnings.filterwarnings("error", message=".*one sequence of a batch at a time")
        logits = logits_in(model, sequences)
    assert attention_used(model) == f"{KERNELS[0]}, one call a layer"
    assert (logits.double().cpu() - expected).norm() < 0.2 * (expected - expected.mean(-1, keepdim=True)).norm()


@pytest.mark.skipif(not KERNELS, reason="has no kernel that takes all sequences in one call")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_host_does_not_wait(checkpointed):
    """For statistics of a batch, their gradients, and a step of AdamW."""
    policy = build("Llama", "sdpa", **SIZES).to(DEVICE, torch.bfloat16)
    reference = copy.deepcopy(policy)
    if checkpointed:
        checkpoint_activations(policy)
        policy.train()
    models = PolicyAndReference(policy, reference)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    batch = make_batch()
    layout_of(policy, models.read(batch))
    for mode in ("default", "error"):  # the first step chooses layouts and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            models(batch).log_ratio.sum().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())
