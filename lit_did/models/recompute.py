"""What a backward pass can cheaply compute again is not kept for it: products, casts and activation functions.

Of a transformer's layer these are more than a third of what autograd keeps (normalised inputs, gates, gated products);
to compute them again from what is kept anyway takes little beside the layer's matrix products. The numbers are the same
to the bit. It works on any model, from the operations that it calls.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CHEAP = frozenset(
    [
        *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
        *(Tensor.to, Tensor.float, Tensor.type_as),
        *(F.silu, F.gelu, F.relu, torch.relu, Tensor.relu, torch.sigmoid, Tensor.sigmoid),
    ]
)
DEEPEST = 4  # operations on one another
RECENT = 4  # values at hand: several linear layers ask for their common input one after another


class _Expression:
    """The result of an operation, as the operation and what it was given."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.versions = [a._version for a in args if isinstance(a, Tensor)]
        self.depth = 1 + max((a.depth for a in args if isinstance(a, _Expression)), default=0)

    def value(self) -> Tensor:
        if self.versions != [a._version for a in self.args if isinstance(a, Tensor)]:
            raise RuntimeError(
                f"Expected the model to leave what it gave {self.function.__name__} as it was, but it changed it in "
                "place: use `recompute_elementwise=False`."
            )
        args = (a.value() if isinstance(a, _Expression) else a for a in self.args)
        return self.function(*args, **self.kwargs)


class _Watch(TorchFunctionMode):
    """Notes the results of cheap operations while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[int, tuple[weakref.ref[Tensor], int, _Expression]] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in CHEAP or type(result) is not Tensor or not result.requires_grad or not result.is_contiguous():
            return result
        tensors = [a for a in args if isinstance(a, Tensor)]
        if any(isinstance(value, Tensor) for value in kwargs.values()) or any(
            a.data_ptr() == result.data_ptr() for a in tensors
        ):
            return result
        expression = _Expression(func, tuple(self._stand_in(arg) for arg in args), kwargs)
        if expression.depth <= DEEPEST:
            self._results[result.data_ptr()] = (weakref.ref(result), result._version, expression)
        return result

    def find(self, tensor: Tensor) -> _Expression | None:
        """The expression of all that lies in `tensor`'s memory, if it is a result's."""
        known = self._results.get(tensor.data_ptr())
        if known is None:
            return None
        result, version, expression = known[0](), known[1], known[2]
        # A result that is no more has left its memory to others.
        same = result is not None and result.data_ptr() == tensor.data_ptr() and result._version == version
        whole = same and tensor.is_contiguous() and tensor.numel() == result.numel()
        return expression if whole else None

    def _stand_in(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return self.find(arg) or arg.detach()


@contextmanager
def elementwise_recomputed() -> Iterator[None]:
    """Within it, autograd keeps results of cheap operations as the operations; they run again in the backward pass."""
    watch = _Watch()
    recent: deque[tuple[_Expression, Tensor]] = deque(maxlen=RECENT)

    def pack(tensor: Tensor) -> Any:
        expression = watch.find(tensor)
        return tensor if expression is None else (expression, tensor.shape)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        expression, shape = packed
        for known, value in recent:
            if known is expression:
                return value.view(shape)
        with torch.no_grad():
            value = expression.value()
        recent.append((expression, value))
        return value.view(shape)

    with watch, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
