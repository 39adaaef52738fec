"""Loads the compiled operators, and chooses between the fused operators and the plain PyTorch implementation."""

from __future__ import annotations

import ctypes
import importlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from lit_did import __version__
from lit_did.arguments import check_choice

LIBRARIES = Path(__file__).parents[1] / "lib"
_CLONE = Path(__file__).parents[2]
# In a clone Python takes the package from the current folder, so that only an editable install is seen there.
REBUILD = (
    f"pip install --no-deps --editable '{_CLONE}'"
    if (_CLONE / "setup.py").is_file()
    else "pip install --no-deps --force-reinstall . (in a clone of lit-did)"
)
Backend = Literal["auto", "fused", "reference"]
BACKENDS = get_args(Backend)


class Extension(NamedTuple):
    """The compiled operators as found. Without a CUDA library, `cuda` is None, and `cuda_problem` says why."""

    module: ModuleType | None  # lit_did._C: what was built; None where the operators cannot be used
    problem: str | None = None  # why they cannot
    cuda: str | None = None  # the CUDA version and the architectures that the CUDA library was built for
    cuda_problem: str | None = None


def _load() -> Extension:
    this_torch = f"this is torch {torch.__version__}"
    library = LIBRARIES / "lit_did_cpu.so"
    if sys.platform == "win32":
        return Extension(None, f"lit_did has no extension for Windows ({this_torch})")
    if not library.is_file():
        return Extension(None, f"lit_did's extension is not built ({this_torch}). To build it: {REBUILD}")
    try:
        module = importlib.import_module("lit_did._C")
    except ImportError as error:  # among others, where it was built for another version of Python
        return Extension(None, f"lit_did's extension does not load ({error}; {this_torch}). To rebuild it: {REBUILD}")
    # Compared before the library is loaded, which needs symbols that an older torch lacks.
    if TorchVersion(torch.__version__) < module.oldest_torch:
        return Extension(
            None,
            f"lit_did's extension needs torch {module.oldest_torch} or newer, but {this_torch}. "
            f"To use it: pip install 'torch>={module.oldest_torch}'",
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        why = f"{error.__cause__ or error}; {this_torch}"
        return Extension(None, f"lit_did's extension does not load ({why}). To rebuild it: {REBUILD}")
    return Extension(module, None, *_load_cuda())


def _load_cuda() -> tuple[str | None, str | None]:
    """Loads the library for the CUDA version of this torch. Returns what it was built with, or why there is none."""
    if torch.version.cuda is None:
        return None, "this torch is a build without CUDA"
    major = torch.version.cuda.split(".")[0]
    path = LIBRARIES / f"lit_did_cuda{major}.so"
    if not path.is_file():
        try:
            package = importlib.import_module(f"lit_did_cuda{major}")  # which a wheel of its own installs
        except ImportError:
            return None, f"no kernels for CUDA {major} are installed"
        if package.__version__ != __version__:
            return None, f"lit-did-cuda{major} has version {package.__version__}, but lit-did has {__version__}"
        path = Path(str(package.__file__)).with_name(path.name)
    try:
        torch.ops.load_library(path)
        describe = ctypes.CDLL(str(path)).lit_did_cuda_build
    except (OSError, AttributeError) as error:
        return None, f"the kernels for CUDA {major} do not load ({error.__cause__ or error})"
    describe.restype = ctypes.c_char_p
    return describe().decode(), None


EXTENSION: Extension = _load()
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
    return ("cpu", "cuda") if EXTENSION.cuda else ("cpu",)


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
            cause = str(EXTENSION.cuda_problem)
            remedy = "How to install them: `lit-did docs install`."
        else:
            cause = "there are no other kernels"
            remedy = "Nothing needs to be done. `backend='reference'` silences this warning."
        warnings.warn(
            f"lit_did uses its plain PyTorch implementation for {device.type} tensors, because {cause}. "
            f"Results are the same, but slower. {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
    return "reference"
