"""Context parallelism: the processes of a group share the tokens of each packed row (Ulysses, arXiv 2309.14509).

All processes of a group get the same batch. Each runs the layers on its slice of the row's tokens. Attention needs all
tokens. So before it the processes exchange: each gets all tokens of its share of the heads. After it they exchange
again: each gets all heads of its tokens. The output layer runs on the completion tokens of the slice. At the end the
sums over each sequence's tokens are added up over the group, so that its processes have the same statistics and loss.

The gradient: process p of C in a group adds its part s_p to the sums s, and all of them have the group's loss L(s). The
gradient of L is the sum over p of (ds_p/dw)^T dL/ds. DDP and FSDP take the mean over all W processes, and training
minimises the mean over the W / C groups. So each process has to contribute C times its part of that sum. This is what
the transpose of an all_reduce gives: it adds up dL/ds over the C processes of a group, on which it is the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from lit_did.batches.layout import Layout
from lit_did.batches.moving import to_device
from lit_did.ops import SequenceStatistics

_SUMS = ("policy_logprob", "reference_logprob", "log_ratio", "token_did_log_partition")
"""fields of `SequenceStatistics`; the others are means over tokens"""


def context_group(size: int) -> ProcessGroup:
    """This process's group of `size` processes with consecutive ranks. All processes make their first call together."""
    world = dist.group.WORLD
    assert world is not None
    return _group(world, size)


@lru_cache(maxsize=8)
def _group(world: ProcessGroup, size: int) -> ProcessGroup:
    return dist.new_subgroups(size)[0]


def own_tokens(layout: Layout, group: ProcessGroup, device: torch.device) -> Layout:
    """This process's slice of a packed row, on `device`. `attention_mask` still describes the whole row.

    A segment of padding makes the number of tokens a multiple of the number of processes.

    Args:
        layout: What `packed_layout` returned, on the CPU.
        group: The processes that share the row.
        device: Where the model is.
    """
    tokens, segments = layout.inputs["input_ids"].shape[1], layout.inputs["attention_mask"]
    padding = -tokens % group.size()
    share = (tokens + padding) // group.size()
    start = group.rank() * share
    if padding:
        segments = torch.cat([segments, torch.tensor([[[[padding, -1]]]])], dim=2)
    inputs = {
        name: F.pad(layout.inputs[name], (0, padding))[:, start : start + share]
        for name in ("input_ids", "position_ids")
    }
    own = (layout.rows >= start) & (layout.rows < start + share)
    numbers = layout.cu_labels.diff()
    of_sequence = torch.repeat_interleave(torch.arange(len(numbers)), numbers)[own]
    own_labels = torch.bincount(of_sequence, minlength=len(numbers)).cumsum(0)
    return layout._replace(
        inputs={name: to_device(value, device) for name, value in inputs.items()} | {"attention_mask": segments},
        rows=to_device(layout.rows[own] - start, device),
        labels=to_device(layout.labels[own], device),
        cu_labels=to_device(F.pad(own_labels, (1, 0)), device),
    )


def exchange(group: ProcessGroup, gather: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Between [1, heads, tokens / C, dim] and [1, heads / C, tokens, dim] of some tensors, for C processes.

    Args:
        group: The processes.
        gather: Whether to gather tokens. Otherwise heads are gathered.
        tensors: Of any numbers of heads.

    Raises:
        ValueError: C does not divide a number of heads.
    """
    for heads in (tensor.shape[1] for tensor in tensors):
        if gather and heads % group.size():
            raise ValueError(
                "Expected `context_parallel_size` to divide the numbers of heads of queries, keys and values, because "
                f"processes share the heads, but got {group.size()} with {heads} heads. Use a divisor of {heads}."
            )
    return _Exchange.apply(group, gather, *tensors)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, gather: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.gather = group, gather
        return tuple(_exchanged(tensor, group, gather) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_exchanged(gradient, ctx.group, not ctx.gather) for gradient in gradients)


def _exchanged(tensor: Tensor, group: ProcessGroup, gather: bool) -> Tensor:
    """As `exchange`, of one tensor and without a gradient."""
    # [C, heads / C, tokens / C, dim]: what each process gets, and then what each has sent.
    parts = tensor[0].unflatten(0, (group.size(), -1)) if gather else tensor[0].unflatten(1, (group.size(), -1))
    given = (parts if gather else parts.transpose(0, 1)).contiguous()
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=group)
    return taken.transpose(0, 1).flatten(1, 2)[None] if gather else taken.flatten(0, 1)[None]


def over_group(own: SequenceStatistics, group: ProcessGroup) -> SequenceStatistics:
    """The statistics of whole sequences, from those of each process's tokens."""
    counts, values = own.num_tokens.double(), own._asdict()
    del values["num_tokens"]
    parts = [value.double() * (1 if name in _SUMS else counts) for name, value in values.items()]
    *sums, total = _Sum.apply(group, *parts, counts)
    whole = {
        name: (added / (1 if name in _SUMS else total.clamp(min=1))).to(values[name].dtype)
        for name, added in zip(values, sums, strict=True)
    }
    return SequenceStatistics(**whole, num_tokens=total.to(own.num_tokens.dtype))


class _Sum(torch.autograd.Function):
    """Adds up tensors of one shape over a group. Fields without a gradient keep none, so that operators skip them."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.size = group.size()
        total = torch.stack(tensors)
        dist.all_reduce(total, group=group)
        return tuple(row.clone() for row in total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else ctx.size * gradient for gradient in gradients)
