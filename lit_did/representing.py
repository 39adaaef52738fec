"""A short `repr` for results: the shapes and ranges of tensors instead of their numbers."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

_NamedTuple = TypeVar("_NamedTuple", bound=type[tuple[Any, ...]])


def short_repr(cls: _NamedTuple) -> _NamedTuple:
    """Makes the `repr` of a named tuple show the shapes and ranges of tensors instead of their numbers.

    Args:
        cls: A `NamedTuple` class of tensors and numbers.

    Returns:
        The same class.

    Example:
        >>> import torch
        >>> from typing import NamedTuple
        >>> @short_repr
        ... class Result(NamedTuple):
        ...     loss: Tensor
        ...     entropy: float
        >>> Result(torch.tensor([0.5, 1 / 3, 0.7]), 2 / 3)
        Result(loss=float32[3] 0.3333 to 0.7, entropy=0.66667)
    """
    cls.__repr__ = _repr  # type: ignore[method-assign]
    return cls


def _repr(result: Any) -> str:
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
    # The range of a sharded tensor would need all processes.
    if type(value) is not Tensor or value.is_meta or not value.numel():
        return text
    try:
        least, largest = (float(extreme) for extreme in value.detach().aminmax())
    except RuntimeError:  # a tensor inside torch.func has no values
        return text
    return f"{text} {least:.4g}" + (f" to {largest:.4g}" if value.numel() > 1 else "")
