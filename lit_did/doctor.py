"""`lit-did doctor`: the installed packages, the built extension, and what each device uses."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lit_did.cli.errors import Arguments

PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "peft", "trl", "datasets", "matplotlib", "gguf")


def report() -> str:
    """Says what is installed, what is built and which backend runs on which device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report names the problem
        import lit_did
        from lit_did.ops.extension import EXTENSION

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
            f"extension     for torch {built.oldest_torch} and newer",
            f"CPU           SIMD levels {', '.join(built.simd_levels)}; {_simd_level(built)}",
            f"CUDA          {_cuda(EXTENSION)}",
        ]
    lines += ["", f"cpu tensors   {_operators('cpu')}"]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        lines += [f"cuda tensors  {_operators('cuda')} ({names})"]
    elif torch.version.cuda is None:
        lines += ["cuda tensors  not possible: this torch is a build without CUDA"]
    else:
        lines += [f"cuda tensors  {_operators('cuda')}, but no CUDA device is found"]
    return "\n".join(lines)


def _installed(name: str) -> str:
    if name == "torch":
        return torch.__version__  # includes the build: 2.14.1+cu130
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _simd_level(built: Any) -> str:
    try:
        return f"this processor uses {built.simd_level()}"
    except ValueError as error:  # LIT_DID_SIMD names a level that this processor lacks
        return str(error)


def _cuda(extension: Any) -> str:
    if extension.cuda is None:
        return f"none: {extension.cuda_problem}"
    version, *architectures = extension.cuda.split()
    return f"{version}, architectures {', '.join(architectures)}"


def _fused_devices() -> Collection[str]:
    from lit_did.ops.extension import fused_devices

    return fused_devices()


def _operators(device: str) -> str:
    return "fused operators" if device in _fused_devices() else "plain PyTorch implementation (slower)"


def main(arguments: list[str] | None = None) -> int:
    """Prints the report.

    Args:
        arguments: The arguments after the program's name. None: those of this process.

    Returns:
        The exit status: 0 if fused operators run on the CPU, 1 if the plain PyTorch implementation does.
    """
    parser = Arguments(
        prog="lit-did doctor",
        description=report.__doc__,
        epilog="The exit status is 0 if fused operators run on the CPU, else 1.",
    )
    parser.add_argument("--quiet", action="store_true", help="prints nothing: look at the exit status")
    text = report()
    if not parser.parse_args(arguments).quiet:
        print(text)
    return 0 if "cpu" in _fused_devices() else 1


if __name__ == "__main__":
    sys.exit(main())
