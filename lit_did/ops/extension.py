"""Loads the compiled extension, and chooses between the fused operators and the plain PyTorch implementation."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lit_did.arguments import check_choice

_CLONE = Path(__file__).parents[2]
# In a clone Python takes the package from the current folder, so that only an editable install is seen there.
REBUILD = (
    f"pip install --no-build-isolation --no-deps --editable '{_CLONE}'"
    if (_CLONE / "setup.py").is_file()
    else "pip install --no-build-isolation --no-deps --force-reinstall . (in a clone of lit-did)"
)
Backend = Literal["auto", "fused", "reference"]
BACKENDS = get_args(Backend)


class Extension(NamedTuple):
    """The extension as found: its module, or why there is none."""

    module: ModuleType | None
    problem: str | None


def _load() -> Extension:
    record = Path(__file__).parents[1] / "_build.json"
    if not record.is_file():
        return Extension(
            None, f"lit_did's extension is not built (this is torch {torch.__version__}). To build it: {REBUILD}"
        )
    try:
        built_for = json.loads(record.read_text())["torch"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Extension(None, f"lit_did's build record {record} cannot be read ({error!r}). To rebuild: {REBUILD}")
    # Compared before the library is loaded: against another torch it may load and then crash.
    if built_for != torch.__version__:
        return Extension(
            None,
            f"lit_did's extension was built for torch {built_for}, but this is torch {torch.__version__}. "
            f"To rebuild it: {REBUILD}",
        )
    try:
        return Extension(importlib.import_module("lit_did._C"), None)
    except ImportError as error:
        return Extension(
            None,
            f"lit_did's extension, built for torch {built_for}, does not load under torch {torch.__version__} "
            f"({error}). To rebuild it: {REBUILD}",
        )


EXTENSION = _load()
if EXTENSION.problem:
    warnings.warn(
        f"lit_did uses its plain PyTorch implementation: results are the same, but slower. {EXTENSION.problem}",
        RuntimeWarning,
        stacklevel=2,
    )

_announced: set[str] = set()


def fused_devices() -> tuple[str, ...]:
    """Device types that the fused operators of this install support."""
    if EXTENSION.module is None:
        return ()
    return ("cpu", "cuda") if EXTENSION.module.cuda_version else ("cpu",)


def check_backend(backend: Backend) -> None:
    """Raises TypeError or ValueError unless `backend` is one of `Backend`."""
    check_choice("backend", backend, Backend)


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of `tensors` is inside a transform of `torch.func` or `torch.vmap`, or has a forward-mode tangent."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        return True
    if torch.compiler.is_compiling():  # cannot look inside; what it cannot transform itself, it refuses
        return False
    return any(torch.func.debug_unwrap(tensor, recurse=False) is not tensor for tensor in given)


def check_gradients(grads: Iterable[Tensor | None]) -> None:
    """Raises RuntimeError where the gradients that a fused backward gets are batched, or have tangents."""
    if is_transformed(grads):
        raise RuntimeError(
            "Expected `backend='reference'` where gradients are batched (torch.vmap over torch.autograd.grad) or have "
            "forward-mode tangents, but got the fused operators, whose backward takes one plain gradient at a time."
        )


def choose_backend(
    backend: Backend, device: torch.device, tensors: Iterable[Tensor | None]
) -> Literal["fused", "reference"]:
    """Resolves `backend` to "fused" or "reference" for `tensors`, which are on `device`.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: `backend` is "fused", and the fused operators do not support `device` or transformed tensors.
    """
    check_backend(backend)
    if backend == "reference":
        return backend
    if is_transformed(tensors):
        if backend == "auto":
            return "reference"
        raise RuntimeError(
            "Expected `backend` to be 'auto' or 'reference' under torch.func's transforms (vmap, grad, jvp, ...) and "
            "forward-mode differentiation, which the fused operators do not support, but got 'fused'."
        )
    supported = fused_devices()
    if device.type in supported:
        return "fused"
    if backend == "fused":
        has = ", ".join(["reference", *(f"fused ({name})" for name in supported)])
        cause = f" {EXTENSION.problem}." if EXTENSION.problem else ""
        raise RuntimeError(
            f"Expected a fused operator for `backend='fused'` on {device.type}, but this install has: {has}.{cause}"
        )
    if EXTENSION.problem is None and device.type not in _announced:
        _announced.add(device.type)
        if device.type == "cuda":
            cause = "was built without CUDA kernels"
            remedy = "To build them, install nvcc and then lit_did again, see `lit-did docs install`."
        else:
            cause = f"has no kernels for {device.type} tensors"
            remedy = "Nothing needs to be done. `backend='reference'` silences this warning."
        warnings.warn(
            f"lit_did {cause}, so it uses its plain PyTorch implementation. Results are the same, but slower. {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
    return "reference"
