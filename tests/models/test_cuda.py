"""Attention of packed rows on a GPU: the real kernels against those of the CPU in float64, and what the host waits for.

`make gpu` runs these. Without a CUDA device all are skipped.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

from lit_did.batches.sequences import read_sequences
from lit_did.models import attention, flex, varlen
from lit_did.models.loading import checkpoint_activations
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.trial import attention_used, layout_of
from tests.models import flash  # noqa: F401  its kernels for the CPU are the truth
from tests.models.architectures import build, logits_alone, logits_in, make_batch
from tests.models.test_attention import SEGMENTS
from tests.models.test_flex import attends

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
        attention.prepare(own, inputs[0].device, chosen)
        output = varlen.attend(*inputs, attention._prepared[own], sliding_window=sliding_window, scaling=0.1)
        gradients = torch.autograd.grad(output, inputs, upstream.to(inputs[0].device))
        results.append([x.detach().cpu().float() for x in (output, *gradients)])
    for truth, result in zip(*results, strict=True):
        torch.testing.assert_close(result, truth, rtol=0.02, atol=0.02 * truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_attention(dtype, softcap):
    """Of any number of tokens and window, with sinks if there is no softcap."""
    torch.manual_seed(0)
    for pairs, window in ((1, None), (12, None), (12, 100), (9, 3)):
        parts = [np.array(SEGMENTS) * (7, 1) + (0, 6 * pair) * (np.array(SEGMENTS) >= 0) for pair in range(pairs)]
        segments = np.concatenate(parts)
        tokens = int(segments[:, 0].sum())
        given = [torch.randn(1, n, tokens, 64, dtype=dtype, device=DEVICE, requires_grad=True) for n in (4, 2, 2)]
        sinks = None if softcap else torch.randn(4, device=DEVICE, requires_grad=True)
        masks = flex.BlockMasks(torch.from_numpy(segments)[None, None], DEVICE)
        output = flex.attend(*given, masks, scaling=0.1, sliding_window=window, softcap=softcap, s_aux=sinks)
        inputs = [*given, *([] if sinks is None else [sinks])]
        query, key, value = (x.double().repeat_interleave(4 // x.shape[1], dim=1) for x in given)
        scores = query @ key.mT * 0.1
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~attends(segments, window).to(DEVICE), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(1, -1, tokens, 1)], dim=-1)
        truth = (scores.softmax(-1)[..., :tokens] @ value).transpose(1, 2)
        upstream = torch.randn_like(output)
        results = [output, *torch.autograd.grad(output, inputs, upstream)]
        truths = [truth, *torch.autograd.grad(truth, inputs, upstream.double())]
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        for result, expected in zip(results, truths, strict=True):
            assert (result.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("name", "implementation"), [("Mistral", "sdpa"), ("Gemma2", "eager")])
def test_models_in_float32(name, implementation):
    """Flex attention in one call a layer, shared prompts and windows too. The trial compares gradients."""
    model = build(name, implementation, **SIZES)
    sequences = read_sequences(make_batch())
    with torch.no_grad():
        expected = torch.cat(logits_alone(model, sequences))
    with pytest.warns(UserWarning, match="uses flex attention"):
        logits = logits_in(model.to(DEVICE), sequences)
    layout_of(model, sequences)
    assert attention_used(model) == "flex_attention, one call a layer"
    torch.testing.assert_close(logits.double().cpu(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


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


@pytest.mark.parametrize("dtype", [torch.float32, *[torch.bfloat16] * bool(KERNELS)])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.filterwarnings("ignore:.*uses flex attention")
def test_the_host_does_not_wait(checkpointed, dtype):
    """For statistics of a batch, their gradients, and a step of AdamW: by flash attention, or flex attention."""
    policy = build("Llama", "sdpa", **SIZES).to(DEVICE, dtype)
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
