"""Builds the extension `lit_did._C`; everything else about the package is in pyproject.toml.

Environment: LIT_DID_EXTENSION=0 installs pure Python. LIT_DID_CUDA=1 demands the CUDA kernels, 0 leaves them out;
unset, they are built where nvcc and a CUDA build of torch are found. TORCH_CUDA_ARCH_LIST chooses architectures.
This version has no CUDA sources yet, so that 1 fails and CUDA tensors are served by the reference.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def switch(name: str) -> bool | None:
    """The environment switch `name`: True for 1, False for 0, None where it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"Expected the environment variable {name} to be 0 or 1, but got {value!r}.")
    return None if value == "" else value == "1"


def extension_arguments() -> dict:
    """The `setup` arguments that build the extension; empty for a pure Python install."""
    if switch("LIT_DID_EXTENSION") is False:
        return {}
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        sys.exit(
            f"lit-did's extension is built against the torch and pybind11 that are installed ({error}): run "
            "`pip install torch setuptools pybind11 ninja`, then `pip install --no-build-isolation .` "
            "(or LIT_DID_EXTENSION=0 for pure Python)."
        )

    wants_cuda = switch("LIT_DID_CUDA")
    has_nvcc = cpp_extension.CUDA_HOME is not None and (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists()
    cuda_sources = sorted(map(str, CSRC.glob("cuda/*.cu")))
    can_cuda = has_nvcc and torch.version.cuda is not None
    if wants_cuda and not can_cuda:
        sys.exit(
            "LIT_DID_CUDA=1 demands the CUDA kernels, which need nvcc and a CUDA build of torch, but got "
            f"nvcc: {'found' if has_nvcc else 'missing (set CUDA_HOME)'}, torch {torch.__version__}: "
            f"{'CUDA ' + torch.version.cuda if torch.version.cuda else 'a build without CUDA'}."
        )
    if wants_cuda and not cuda_sources:
        sys.exit("LIT_DID_CUDA=1 demands the CUDA kernels, but this version of lit-did has none yet: only the CPU's.")
    cuda = wants_cuda is not False and can_cuda and bool(cuda_sources)
    print(f"lit-did: building {'with' if cuda else 'without'} CUDA for torch {torch.__version__}", file=sys.stderr)

    class BuildExtension(cpp_extension.BuildExtension):
        """Compiles the row kernels once an instruction set, each with its own flags, then the rest."""

        def build_extension(self, ext):
            ext.extra_objects = compile_rows(Path(self.build_temp))
            super().build_extension(ext)

        def run(self):
            super().run()
            # Read before the library is loaded, which another torch may not survive.
            package = Path("lit_did" if self.inplace else f"{self.build_lib}/lit_did")
            built = {"torch": torch.__version__, "cuda": torch.version.cuda if cuda else None}
            (package / "_build.json").write_text(json.dumps(built) + "\n")

    flags = ["-O3", "-std=c++20", f'-DLIT_DID_TORCH_VERSION="{torch.__version__}"', *levels_define()]
    sources = ["bindings.cpp", "checks.cpp", "cpu/dispatch.cpp", "cpu/token_statistics.cpp"]
    arguments = {
        "name": "lit_did._C",
        "sources": [str(CSRC / source) for source in sources],
        "include_dirs": [pybind11.get_include()],
    }
    if cuda:
        arguments["sources"] += cuda_sources
        arguments["extra_compile_args"] = {"cxx": flags, "nvcc": ["-O3"]}
        extension = cpp_extension.CUDAExtension(**arguments)
    else:
        extension = cpp_extension.CppExtension(**arguments, extra_compile_args={"cxx": flags})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def levels_define() -> list[str]:
    return ["-DLIT_DID_HAS_X86_LEVELS"] if IS_X86 else []


def compile_rows(build_folder: Path) -> list[str]:
    """One object file an instruction set. These sources know nothing of torch or Python."""
    build_folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++").split()
    commands, objects = [], []
    for level, level_flags in {"baseline": [], **(X86_FLAGS if IS_X86 else {})}.items():
        objects.append(str(build_folder / f"rows_{level}.o"))
        flags = ["-O3", "-std=c++17", "-fPIC", "-Wno-psabi", *levels_define(), *level_flags]
        commands.append([*compiler, *flags, "-c", str(CSRC / f"cpu/rows_{level}.cpp"), "-o", objects[-1]])
    with ThreadPoolExecutor() as pool:
        list(pool.map(subprocess.check_call, commands))
    return objects


setup(**extension_arguments())
