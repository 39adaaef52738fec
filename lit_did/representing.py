"""One line for a result: the shapes and ranges of its tensors in the place of their numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


def short_repr(result: NamedTuple) -> str:
    """What `repr` of a named tuple of tensors and numbers gives: `__repr__ = short_repr`.

    >>> import torch
    >>> class Result(NamedTuple):
    ...     loss: Tensor
    ...     entropy: float
    ...     __repr__ = short_repr
    >>> Result(torch.tensor([0.5, 1 / 3, 0.7]), 2 / 3)
    Result(loss=float32[3] 0.3333 to 0.7, entropy=0.66667)
    """
    fields = (f"{name}={_describe(value)}" for name, value in zip(result._fields, result, strict=True))
    return f"{type(result).__name__}({', '.join(fields)})"


def _describe(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({len(value)} fields)"
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    # Numbers of a plain tensor alone: those of a sharded one need all processes.
    if type(value) is not Tensor or value.is_meta or not value.numel():
        return text
    try:
        least, largest = (float(extreme) for extreme in value.detach().aminmax())
    except RuntimeError:  # a tensor of torch.func has no numbers
        return text
    return f"{text} {least:.4g}" + (f" to {largest:.4g}" if value.numel() > 1 else "")
