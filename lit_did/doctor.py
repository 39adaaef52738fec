"""`python -m lit_did.doctor`: what is installed, what is built, and what serves which device."""

from __future__ import annotations

import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "peft", "trl", "datasets", "matplotlib", "gguf")


def report() -> str:
    """The whole report as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the extension's problem is reported below
        import lit_did
        from lit_did.ops.extension import EXTENSION, fused_devices

    lines = [
        f"lit-did       {lit_did.__version__}",
        f"Python        {platform.python_version()} ({sys.executable})",
        f"platform      {platform.platform()}",
        *(f"{name:13} {_installed(name)}" for name in PACKAGES),
        "",
    ]
    built = EXTENSION.module
    if built is None:
        lines += [f"extension     none: {EXTENSION.problem}"]
    else:
        lines += [
            f"extension     built for torch {built.torch_version}",
            f"CPU           SIMD levels {', '.join(built.simd_levels)}; {_simd_level(built)}; "
            + ("torch's threads" if built.parallel else "one thread: built without OpenMP"),
            f"CUDA          {_cuda(built)}",
        ]
    served = fused_devices()
    lines += ["", f"cpu tensors   {_serves('cpu', served)}"]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        lines += [f"cuda tensors  {_serves('cuda', served)} ({names})"]
    elif torch.version.cuda is None:
        lines += ["cuda tensors  none: this torch is a build without CUDA"]
    else:
        lines += [f"cuda tensors  {_serves('cuda', served)}, once there is a CUDA device: none is found"]
    return "\n".join(lines)


def _installed(name: str) -> str:
    if name == "torch":
        return torch.__version__  # with its build: 2.14.1+cu130
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _simd_level(built) -> str:
    try:
        return f"this processor uses {built.simd_level()}"
    except ValueError as error:  # LIT_DID_SIMD names one that it has not
        return str(error)


def _cuda(built) -> str:
    if built.cuda_version is None:
        return "not in this build"
    return f"{built.cuda_version}, architectures {', '.join(built.cuda_architectures)}"


def _serves(device: str, served: tuple[str, ...]) -> str:
    return "served by the fused operators" if device in served else "served by the reference, in plain torch"


if __name__ == "__main__":
    print(report())
