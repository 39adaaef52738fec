"""What a backward pass can cheaply compute again is not kept for it: products, casts, copies, activation functions.

Of a Llama layer these are nearly half of what autograd keeps (normalised inputs, gates, gated products, the sequences'
attention joined); to compute them again from what is kept anyway takes little beside the layer's matrix products. The
numbers are the same to the bit. It works on any model, from the operations that it calls.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CHEAP = frozenset(
    [
        *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
        *(Tensor.to, Tensor.float, Tensor.type_as),
        *(torch.cat, Tensor.reshape, Tensor.contiguous),
        *(F.silu, F.gelu, F.relu, torch.relu, Tensor.relu, torch.sigmoid, Tensor.sigmoid),
    ]
)
DEEPEST = 4  # operations on one another
RECENT = 4  # values at hand: linear layers ask for their common input, a product for its factors, soon after another


class _Expression:
    """The result of an operation, as the operation and what it was given."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.versions = [a._version for a in _flat(args) if isinstance(a, Tensor)]
        self.depth = 1 + max((a.depth for a in _flat(args) if isinstance(a, _Expression)), default=0)

    def value(self, compute: Callable[[_Expression], Tensor]) -> Tensor:
        """The result; `compute` gives those of the expressions within."""
        if self.versions != [a._version for a in _flat(self.args) if isinstance(a, Tensor)]:
            raise RuntimeError(
                f"Expected the model to leave what it gave {self.function.__name__} as it was, but it changed it in "
                "place: use `recompute_elementwise=False`."
            )
        args = _each(self.args, lambda a: compute(a) if isinstance(a, _Expression) else a)
        return self.function(*args, **self.kwargs)


def _flat(args: tuple) -> Iterator[Any]:
    """Arguments, and what lists among them hold."""
    for arg in args:
        yield from arg if isinstance(arg, list | tuple) else (arg,)


def _each(args: tuple, function: Callable[[Any], Any]) -> tuple:
    """`function` of each argument, and of each in lists among them."""
    return tuple(list(map(function, arg)) if isinstance(arg, list | tuple) else function(arg) for arg in args)


class _Saved(NamedTuple):
    """What a backward pass will need."""

    value: Tensor | _Expression
    version: int
    """of the tensor"""
    shape: torch.Size


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
        tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
        if any(isinstance(value, Tensor) for value in _flat(tuple(kwargs.values()))) or any(
            a.data_ptr() == result.data_ptr() for a in tensors
        ):
            return result
        expression = _Expression(func, _each(args, self._stand_in), kwargs)
        if expression.depth <= DEEPEST:
            key, results = result.data_ptr(), self._results
            # Forgotten with its result: what an expression was given would stay in memory.
            alive = weakref.ref(result, lambda _: results.pop(key, None))
            results[key] = (alive, result._version, expression)
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

    def clear(self) -> None:
        """Forgets all."""
        self._results.clear()

    def _stand_in(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return self.find(arg) or arg.detach()


@contextmanager
def elementwise_recomputed(kept_bytes: int = 0) -> Iterator[None]:
    """Within it, autograd keeps results of cheap operations as the operations; they run again in the backward pass.

    The first `kept_bytes` of them are kept as they are all the same.
    """
    watch = _Watch()
    recent: deque[tuple[_Expression, Tensor]] = deque(maxlen=RECENT)
    kept: set[_Expression] = set()

    def keep(expression: _Expression, size: int) -> bool:
        nonlocal kept_bytes
        if expression not in kept and size <= kept_bytes:
            kept.add(expression)
            kept_bytes -= size
        return expression in kept

    def pack(tensor: Tensor) -> _Saved:
        expression = watch.find(tensor)
        if expression is None or keep(expression, tensor.nbytes):
            return _Saved(tensor, tensor._version, tensor.shape)
        return _Saved(expression, 0, tensor.shape)

    def compute(expression: _Expression) -> Tensor:
        for known, value in recent:
            if known is expression:
                return value
        value = expression.value(compute)
        recent.append((expression, value))
        return value

    def unpack(saved: _Saved) -> Tensor:
        if isinstance(saved.value, Tensor):
            if saved.value._version != saved.version:  # what autograd checks where there are no hooks
                raise RuntimeError(
                    "Expected what the backward pass needs to be left as it was, but the model changed a tensor of "
                    f"shape {list(saved.shape)} in place."
                )
            return saved.value
        with torch.no_grad():
            return compute(saved.value).view(saved.shape)

    try:
        with watch, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:  # autograd keeps the hooks, and what they refer to, until the backward pass
        watch.clear()
        kept.clear()
