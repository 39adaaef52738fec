"""The compiled operators to PyTorch: their fake kernels, which tell shapes to torch.compile, and their gradients.

Imported only where the extension loaded. Schemas and kernels: csrc/bindings.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_did.ops.statistics import TokenStatistics

NUM_NORMALIZERS = 4  # log2-sum-exp2 of the three rows and their flags: csrc/row_statistics.h


def token_statistics(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int, temperature: float
) -> TokenStatistics:
    """`lit_did.token_statistics` for checked arguments: logits [..., V], labels [...] int64."""
    outputs = torch.ops.lit_did.token_statistics(
        _row_contiguous(policy_logits), _row_contiguous(reference_logits), labels, ignore_index, float(temperature)
    )
    return TokenStatistics(*outputs[: len(TokenStatistics._fields)])


def _row_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@torch.library.register_fake("lit_did::token_statistics")
def _(policy_logits, reference_logits, labels, ignore_index, temperature):
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    values = [policy_logits.new_empty(labels.shape, dtype=dtype) for _ in TokenStatistics._fields]
    return (*values, policy_logits.new_empty((*labels.shape, NUM_NORMALIZERS), dtype=torch.float64))


@torch.library.register_fake("lit_did::token_statistics_backward")
def _(
    grads,
    policy_logits,
    reference_logits,
    labels,
    statistics,
    normalizers,
    ignore_index,
    temperature,
    policy_needs_grad,
    reference_needs_grad,
):
    return (
        policy_logits.new_empty(policy_logits.shape if policy_needs_grad else 0),
        reference_logits.new_empty(reference_logits.shape if reference_needs_grad else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    policy_logits, reference_logits, labels, ctx.ignore_index, ctx.temperature = inputs
    # A statistic that the loss does not use has no gradient then, and the backward skips its share of the work.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(policy_logits, reference_logits, labels, *output)


def _backward(ctx, *grads):
    policy_logits, reference_logits, labels, *statistics, normalizers = ctx.saved_tensors
    needs_policy, needs_reference = ctx.needs_input_grad[:2]
    grads = list(grads[: len(statistics)])
    if all(grad is None for grad in grads):
        return (None,) * 5
    grad_policy, grad_reference = torch.ops.lit_did.token_statistics_backward(
        grads,
        policy_logits,
        reference_logits,
        labels,
        statistics,
        normalizers,
        ctx.ignore_index,
        ctx.temperature,
        needs_policy,
        needs_reference,
    )
    return (grad_policy if needs_policy else None, grad_reference if needs_reference else None, None, None, None)


def _no_second_backward(ctx, *grads):
    raise RuntimeError("The fused token statistics are differentiable once: use `backend='reference'` for more.")


torch.library.register_autograd("lit_did::token_statistics", _backward, setup_context=_setup_context)
torch.library.register_autograd("lit_did::token_statistics_backward", _no_second_backward)
