"""Gradients that are whole or sharded, over one mesh of processes or several: inner products, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate

from lit_did.models.sharding import is_sharded


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def inner_product(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the inner products of pairs of tensors, over the shards of all processes: a scalar.

    The two tensors of a pair are sharded alike. The sum is in float32 at least: half precision would lose or overflow
    squares.
    """
    sums: dict[Any, list[Tensor]] = {}
    for one, other in pairs:
        wide = torch.promote_types(one.dtype, torch.float32)
        product = torch.dot(*(local(tensor).flatten().to(wide) for tensor in (one, other)))
        layout = (one.device_mesh, one.placements) if isinstance(one, DTensor) else None
        sums.setdefault(layout, []).append(product)
    return torch.stack([_over_shards(torch.stack(products).sum(), layout) for layout, products in sums.items()]).sum()


def clip_gradients(gradients: Sequence[Tensor], limit: float, algorithm: str) -> None:
    """Clips gradients in place, as `torch.nn.utils` does it with whole ones.

    Args:
        gradients: The gradients.
        limit: The largest norm of all together, or the largest absolute value.
        algorithm: "norm" or "value".
    """
    if algorithm == "value":
        torch._foreach_clamp_min_([local(g) for g in gradients], -limit)
        torch._foreach_clamp_max_([local(g) for g in gradients], limit)
    elif gradients:
        norm = inner_product((gradient, gradient) for gradient in gradients).sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            local(gradient).mul_(factor.to(gradient.device))


def separate_gradients(parameters: Sequence[Tensor], backward: Callable[[], None]) -> list[Tensor | None]:
    """The gradients of a backward pass, which are not added to those that the parameters have.

    Unlike `torch.autograd.grad`, it lets FSDP reduce them over the processes.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward()
    gradients = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return gradients


def accumulate_gradients(policy: nn.Module, backward: Callable[[], None]) -> None:
    """A backward pass that adds to the gradients of the policy.

    With tensor parallelism alone, transformers sums the gradients of some parameters over the processes in a hook that
    reads `.grad`, such as those of Qwen 3's `q_norm`. It would sum earlier gradients again.
    """
    by_tensors = not any(isinstance(module, FSDPModule) for module in policy.modules()) and is_sharded(policy)
    apart = [p for p in policy.parameters() if by_tensors and p.requires_grad and not isinstance(p, DTensor)]
    for parameter, gradient in zip(apart, separate_gradients(apart, backward), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _over_shards(value: Tensor, layout: Any) -> Tensor:
    if layout is None:
        return value
    mesh, placements = layout
    summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(value, mesh, summed, run_check=False).full_tensor()
