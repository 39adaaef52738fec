"""TensorBytes: counts the bytes of all tensors that are alive, and remembers who held them when they were most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_did.modules.gradients import local

WEIGHTS = "policy weights"
REFERENCE = "reference"
OPTIMIZER = "optimiser states"
GRADIENTS = "gradients"
ACTIVATIONS = "activations"
OUTPUT_LAYER = "output layer"
EXCHANGE = "gathered and cast weights"
HOLDERS = (WEIGHTS, REFERENCE, OPTIMIZER, GRADIENTS, ACTIVATIONS, OUTPUT_LAYER, EXCHANGE)
"""what holds memory, in the order of a table"""
_EXCHANGED = ("c10d", "fsdp")  # the namespaces of the operators with which FSDP gathers weights and reduces gradients


class Peak(NamedTuple):
    """The most bytes that were alive at a time, and how many of them each holder had then."""

    total: int
    held: dict[str, int]


class TensorBytes(TorchDispatchMode):
    """Counts the storages of tensors that operators return, of fake tensors and of real ones.

    A storage belongs to the holder that was set when it was made, until it is claimed by another one. What a kernel
    allocates and frees inside is not counted.

    Example:
        >>> with TensorBytes() as counted:
        ...     a = torch.zeros(256)
        ...     b = a + 1
        ...     del a, b
        >>> counted.now, counted.peaks[None].total
        (0, 2048)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.held: Counter[str] = Counter()
        self.peaks: dict[Hashable, Peak] = {}
        """of each phase"""
        self._phase: Hashable = None
        self._holder = ACTIVATIONS
        self._storages: dict[int, tuple[int, str]] = {}  # the bytes and the holder of each
        self._left_out: set[int] = set()

    @property
    def phase(self) -> Hashable:
        """The part of a step whose peak is kept apart from that of other parts."""
        return self._phase

    @phase.setter
    def phase(self, phase: Hashable) -> None:
        self._phase = phase
        self._note()

    @contextmanager
    def holder(self, holder: str) -> Iterator[None]:
        """What new storages belong to."""
        before, self._holder = self._holder, holder
        try:
            yield
        finally:
            self._holder = before

    def set_holder(self, holder: str) -> None:
        """As `holder`, from now on."""
        self._holder = holder

    def claim(self, tensors: Iterable[Tensor | None], holder: str) -> int:
        """Says what storages belong to, also those that no operator has returned. Returns their bytes."""
        claimed = 0
        for tensor in tensors:
            if tensor is not None:
                storage = local(tensor).untyped_storage()
                size = 0 if storage._cdata in self._left_out else storage.nbytes()
                self._count(storage, size, holder, keep=False)
                claimed += size
        return claimed

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Does not count the storages of these tensors, which live as long as this object."""
        self._left_out |= {local(tensor).untyped_storage()._cdata for tensor in tensors}

    def __enter__(self) -> TensorBytes:
        self._resize = torch.UntypedStorage.resize_
        counted, resize = self, self._resize

        # FSDP frees the storages of gathered weights, and allocates them again, without an operator.
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in counted._storages:
                counted._set(storage._cdata, size, counted._storages[storage._cdata][1])
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign,assignment]
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come here again
        if function is torch.ops.prim.device.default and isinstance(arguments[0], FakeTensor):
            return arguments[0].fake_device  # most calls are this one, and it takes long
        result = function(*arguments, **(keywords or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._count(storage, storage.nbytes(), self._holder_of(function, arguments), keep=True)
        if function.namespace in _EXCHANGED:
            self._claim_exchanged(function, arguments, keywords or {})
        return result

    def _holder_of(self, function: Any, arguments: tuple) -> str:
        """The holder of what a function returns: a cast weight, as autocast makes it, is no activation."""
        if function is torch.ops.aten._to_copy.default and self._holder == ACTIVATIONS:
            source = self._storages.get(arguments[0].untyped_storage()._cdata)
            if source is not None and source[1] in (WEIGHTS, REFERENCE):
                return EXCHANGE
        return self._holder

    def _claim_exchanged(self, function: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        tensors = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)]
        if "reduce_scatter" in str(function):
            self._claim_new(tensors[:1], GRADIENTS)
            self._claim_new(tensors[1:], EXCHANGE)
        elif "reduce" not in str(function):  # what is summed in place stays what it is
            self._claim_new(tensors, EXCHANGE)

    def _claim_new(self, tensors: Iterable[Tensor], holder: str) -> None:
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages and self._storages[key][1] in (ACTIVATIONS, OUTPUT_LAYER):
                self._set(key, self._storages[key][0], holder)

    def _count(self, storage: torch.UntypedStorage, size: int, holder: str, *, keep: bool) -> None:
        key = storage._cdata
        if key not in self._storages:
            weakref.finalize(storage, self._set, key, None, "").atexit = False
        elif keep:
            return
        self._set(key, size, holder)

    def _set(self, key: int, size: int | None, holder: str) -> None:
        bytes_before, holder_before = self._storages.pop(key, (0, holder))
        self.held[holder_before] -= bytes_before
        self.now += (size or 0) - bytes_before
        if size is not None:
            self._storages[key] = size, holder
            self.held[holder] += size
        self._note()

    def _note(self) -> None:
        peak = self.peaks.get(self._phase)
        if peak is None or self.now > peak.total:
            self.peaks[self._phase] = Peak(self.now, dict(self.held))


def on_layers(
    layers: Iterable[torch.nn.Module], before: Callable[[int], None], backward: Callable[[int], None]
) -> None:
    """Calls `before` with the number of a layer when it runs, and `backward` when its backward pass begins."""
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, arguments, number=number: before(number))

        def after(module: Any, arguments: Any, output: Any, number: int = number) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda gradient: backward(number))

        layer.register_forward_hook(after)
