"""The compiled operators to PyTorch: fake kernels, from which torch.compile learns shapes, and gradients.

Imported only where the extension loaded. Schemas and kernels: csrc/operators.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_did.ops.checks import (
    check_labels,
    check_leading_dimensions,
    check_not_leaves,
    check_own_memory,
    on_host,
)
from lit_did.ops.extension import EXTENSION, check_gradients
from lit_did.ops.statistics import SequenceStatistics, TokenStatistics

NUM_NORMALIZERS = 5  # log2-sum-exp2 of the three rows, flags, size of the support: csrc/row_statistics.h


def token_statistics(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    inplace_backward: bool,
) -> TokenStatistics:
    """`lit_did.token_statistics` for checked arguments: logits [..., V], labels [...] int64."""
    policy_logits, reference_logits = _row_contiguous(policy_logits), _row_contiguous(reference_logits)
    # A compiled graph gets the ordinary backward: its compiler plans the memory, and has no version counters.
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward:
        check_not_leaves(policy_logits, reference_logits)
    if labels.is_cuda:
        check_leading_dimensions(policy_logits=policy_logits, reference_logits=reference_logits)
    arguments = (policy_logits, reference_logits, labels, ignore_index, float(temperature), inplace_backward)
    try:
        outputs = torch.ops.lit_did.token_statistics(*arguments)
    except Exception:
        # An exception may lose its type and its words on its way through torch's stable ABI. What may be wrong raises
        # here, in full: the environment, the labels, too little memory.
        EXTENSION.module.simd_level()  # type: ignore[union-attr]
        if on_host(labels):
            check_labels(labels, policy_logits.shape[-1], ignore_index)
        _new_statistics(*arguments)
        raise
    return TokenStatistics(*outputs[: len(TokenStatistics._fields)])


def sequence_reduction(
    tokens: TokenStatistics, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int
) -> SequenceStatistics:
    """The sums and means of `lit_did.sequence_statistics`: labels [..., T] int64, cu_seqlens [sequences + 1] int64."""
    return SequenceStatistics(*torch.ops.lit_did.sequence_reduction(list(tokens), labels, cu_seqlens, ignore_index))


def _row_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


# ----------------------------------------------------------------------------------------------------------
# token_statistics: fake kernels and gradient
# ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("lit_did::token_statistics")
def _new_statistics(policy_logits, reference_logits, labels, ignore_index, temperature, inplace_backward=False):
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    values = [policy_logits.new_empty(labels.shape, dtype=dtype) for _ in TokenStatistics._fields]
    return (*values, policy_logits.new_empty((*labels.shape, NUM_NORMALIZERS), dtype=torch.float64))


@torch.library.register_fake("lit_did::token_statistics_backward")
def _new_gradients(
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


@torch.library.register_fake("lit_did::token_statistics_backward_")
@torch.library.register_fake("lit_did::token_partials_")
@torch.library.register_fake("lit_did::merge_token_partials_")
def _(*args):
    return None


@torch.library.register_fake("lit_did::finish_token_partials")
def _(partials, labels, ignore_index, float64):
    dtype = torch.float64 if float64 else torch.float32
    values = [partials.new_empty(labels.shape, dtype=dtype) for _ in TokenStatistics._fields]
    return (*values, partials.new_empty((*labels.shape, NUM_NORMALIZERS)))


def _setup_context(ctx, inputs, output) -> None:
    policy_logits, reference_logits, labels, ctx.ignore_index, ctx.temperature, inplace_backward = inputs
    # Where saved tensors pass through hooks, as in activation checkpointing, autograd does not compare versions: what
    # we overwrite, another backward might read unnoticed.
    ctx.inplace_backward = inplace_backward and not _saved_tensors_have_hooks()
    # A statistic that the loss does not use has no gradient then, and the backward skips its share of the work.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(policy_logits, reference_logits, labels, *output)


def _saved_tensors_have_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _backward(ctx, *grads):
    policy_logits, reference_logits, labels, *statistics, normalizers = ctx.saved_tensors
    needs_policy, needs_reference = ctx.needs_input_grad[:2]
    grads = list(grads[: len(statistics)])
    check_gradients(grads)
    if all(grad is None for grad in grads):
        return (None,) * 6
    arguments = (
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
    # With create_graph the graph lives on and keeps its logits. Compiled autograd does not compare versions. Tensors of
    # a graph that is being traced, which are of types of their own, have no addresses.
    if (
        ctx.inplace_backward
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(normalizers) is Tensor
    ):
        check_own_memory(policy_logits, reference_logits, needs_policy, needs_reference)
        # Autograd refuses other uses of the values that are overwritten.
        torch.autograd.graph.increment_version([*needs_policy * [policy_logits], *needs_reference * [reference_logits]])
        torch.ops.lit_did.token_statistics_backward_(*arguments)
        grad_policy, grad_reference = policy_logits.detach(), reference_logits.detach()
    else:
        try:
            grad_policy, grad_reference = torch.ops.lit_did.token_statistics_backward(*arguments)
        except Exception:
            _new_gradients(*arguments)  # raises torch's own error where memory is short
            raise
    return (grad_policy if needs_policy else None, grad_reference if needs_reference else None, *(None,) * 4)


def _no_second_backward(ctx, *grads):
    raise RuntimeError("The fused token statistics are differentiable once: use `backend='reference'` for more.")


torch.library.register_autograd("lit_did::token_statistics", _backward, setup_context=_setup_context)
torch.library.register_autograd("lit_did::token_statistics_backward", _no_second_backward)


# ----------------------------------------------------------------------------------------------------------
# sequence_reduction: fake kernel and gradient
# ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("lit_did::sequence_reduction")
def _(statistics, labels, cu_seqlens, ignore_index):
    shape = labels.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    values = [statistics[0].new_empty(shape) for _ in SequenceStatistics._fields[:-1]]
    return (*values, labels.new_empty(shape))


def _setup_reduction_context(ctx, inputs, output) -> None:
    _, labels, cu_seqlens, ctx.ignore_index = inputs
    num_tokens = output[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(num_tokens)
    ctx.save_for_backward(labels, cu_seqlens, num_tokens)


def _reduction_backward(ctx, *grads):
    """A token's gradient is its sequence's: gathered, so in one fixed order and without waiting for the device."""
    labels, cu_seqlens, num_tokens = ctx.saved_tensors
    of = SequenceStatistics(*grads)

    def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return a if b is None else b if a is None else a + b

    def of_mean(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad / num_tokens  # by 0 where there is no token to receive it

    of_sequences = TokenStatistics(
        policy_logprob=added(of.policy_logprob, of.log_ratio),
        reference_logprob=added(of.reference_logprob, None if of.log_ratio is None else -of.log_ratio),
        token_did_entropy=of_mean(of.token_did_entropy),
        token_did_concentration=of_mean(of.token_did_concentration),
        token_did_log_partition=of.token_did_log_partition,
        policy_entropy=of_mean(of.policy_entropy),
        reference_entropy=of_mean(of.reference_entropy),
        kl=of_mean(of.kl),
        reverse_kl=of_mean(of.reverse_kl),
    )
    of_tokens = [None] * len(of_sequences)
    used = [i for i, grad in enumerate(of_sequences) if grad is not None]
    if used:
        stacked = torch.stack([of_sequences[i] for i in used])  # [used, ...]: one gather for all
        if cu_seqlens is None:
            stacked = stacked[..., None]
        else:
            tokens = torch.arange(labels.shape[0], device=labels.device)
            # Counted from 1, with a 0 on either side: where the offsets are not checked, tokens may lie in no sequence.
            sequence = torch.searchsorted(cu_seqlens, tokens, right=True)
            stacked = torch.nn.functional.pad(stacked, (1, 1))[:, sequence]
        stacked = torch.where(labels != ctx.ignore_index, stacked, 0)
        for i, grad in zip(used, stacked.unbind(), strict=True):
            of_tokens[i] = grad
    return of_tokens, None, None, None


torch.library.register_autograd(
    "lit_did::sequence_reduction", _reduction_backward, setup_context=_setup_reduction_context
)
