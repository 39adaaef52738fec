"""Loading the compiled extension, and choosing what serves a tensor: the fused operators or the reference."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

_CLONE = Path(__file__).parents[2]
# In a clone Python takes the package from the current folder, so that only an editable install is seen there.
REBUILD = (
    f"pip install --no-build-isolation --no-deps --editable '{_CLONE}'"
    if (_CLONE / "setup.py").is_file()
    else "pip install --no-build-isolation --no-deps --force-reinstall . (in a clone of lit-did)"
)
BACKENDS = ("auto", "fused", "reference")


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
    warnings.warn(f"{EXTENSION.problem}. Until then the slower reference serves.", RuntimeWarning, stacklevel=2)

_announced: set[str] = set()


def fused_devices() -> tuple[str, ...]:
    """Device types that the fused operators of this install serve."""
    if EXTENSION.module is None:
        return ()
    return ("cpu", "cuda") if EXTENSION.module.cuda_version else ("cpu",)


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"Expected `backend` to be one of {', '.join(map(repr, BACKENDS))}, but got {backend!r}.")


def choose_backend(backend: str, device: torch.device) -> str:
    """Resolves `backend` to "fused" or "reference" for tensors on `device`.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: `backend` is "fused" and the fused operators do not serve `device`.
    """
    check_backend(backend)
    if backend == "reference":
        return backend
    served = fused_devices()
    if device.type in served:
        return "fused"
    if backend == "fused":
        has = ", ".join(["reference", *(f"fused ({name})" for name in served)])
        cause = f" {EXTENSION.problem}." if EXTENSION.problem else ""
        raise RuntimeError(
            f"Expected a fused operator for `backend='fused'` on {device.type}, but this install has: {has}.{cause}"
        )
    if EXTENSION.problem is None and device.type not in _announced:
        _announced.add(device.type)
        warnings.warn(
            f"lit_did's extension has no kernels for {device.type} tensors: the slower reference serves.",
            RuntimeWarning,
            stacklevel=3,
        )
    return "reference"
