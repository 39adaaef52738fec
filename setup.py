"""Builds the extension `lit_did._C`. Everything else about the package is in pyproject.toml.

Environment variables:
    LIT_DID_EXTENSION: 0 installs pure Python.
    LIT_DID_CUDA: 1 requires the CUDA kernels, and 0 leaves them out. Unset, they are built if nvcc and a CUDA build of
        torch of the same major version are found.
    CUDA_HOME: The CUDA toolkit. nvcc is CUDA_HOME/bin/nvcc.
    TORCH_CUDA_ARCH_LIST: The GPU architectures to compile for.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
ROWS = str(CSRC / "cpu/rows_")  # compiled separately, once for each instruction set
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Without OpenMP, at::parallel_for silently runs on one thread. Apple's compiler has no OpenMP.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def switch(name: str) -> bool | None:
    """Returns an environment variable: True for 1, False for 0, None if it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"Expected the environment variable {name} to be 0 or 1, but got {value!r}.")
    return None if value == "" else value == "1"


def extension_arguments() -> dict:
    """Returns the arguments of `setup` that build the extension, or none for a pure Python install."""
    if switch("LIT_DID_EXTENSION") is False:
        return {}
    toolkit = find_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # read when torch's builder is imported
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        sys.exit(
            f"Building lit-did's extension needs the installed torch and pybind11, but got: {error}. Run "
            "`pip install torch setuptools pybind11 ninja`, then `pip install --no-build-isolation .`. For pure "
            "Python, set LIT_DID_EXTENSION=0."
        )
    cuda = wants_cuda(toolkit, torch.__version__, torch.version.cuda)

    class BuildExtension(cpp_extension.BuildExtension):
        """Compiles the row kernels once for each instruction set, with its flags, then the rest."""

        def build_extension(self, ext):
            ext.extra_objects = compile_rows(Path(self.build_temp))
            super().build_extension(ext)

        def run(self):
            super().run()
            # Read before the library is loaded, because another torch may crash while loading it.
            package = Path("lit_did" if self.inplace else f"{self.build_lib}/lit_did")
            built = {"torch": torch.__version__, "cuda": torch.version.cuda if cuda else None}
            (package / "_build.json").write_text(json.dumps(built) + "\n")

    flags = ["-O3", "-std=c++20", *OPENMP, f'-DLIT_DID_TORCH_VERSION="{torch.__version__}"', *levels_define()]
    arguments = {
        "name": "lit_did._C",
        "sources": [path for path in sources("*.cpp", "cpu/*.cpp") if not path.startswith(ROWS)],
        "depends": sources("*.h", "*/*.h", "cpu/rows_*.cpp", "cuda/*.cuh", "cuda/nvcc_flags.txt"),
        "include_dirs": [pybind11.get_include()],
        "extra_link_args": OPENMP,
    }
    if cuda:
        # torch's builder turns this variable into flags.
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = cuda_architectures(toolkit)
        print(f"lit-did: CUDA architectures {architectures}", file=sys.stderr)
        flags += [f'-DLIT_DID_CUDA_VERSION="{toolkit.version}"', *headers_that_torch_brings(toolkit)]
        flags.append(f'-DLIT_DID_CUDA_ARCHITECTURES="{architectures}"')
        arguments["sources"] += sources("cuda/*.cpp", "cuda/*.cu")
        # The kernels do not include torch. `make cuda-check` compiles them with the same flags.
        nvcc_flags = (CSRC / "cuda/nvcc_flags.txt").read_text().split()
        arguments["extra_compile_args"] = {"cxx": flags, "nvcc": nvcc_flags}
        extension = cpp_extension.CUDAExtension(**arguments)
    else:
        extension = cpp_extension.CppExtension(**arguments, extra_compile_args={"cxx": flags})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))


# ----------------------------------------------------------------------------------------------------------
# CUDA
# ----------------------------------------------------------------------------------------------------------


class Toolkit:
    """The CUDA toolkit that an nvcc belongs to."""

    def __init__(self, nvcc: str):
        self.nvcc = nvcc
        # nvcc reports its folder, because the nvcc on PATH may be a script that calls another.
        says = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", says, flags=re.MULTILINE)
        self.home = Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]
        says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        self.version = re.search(r"release (\d+\.\d+)", says).group(1)


def find_toolkit() -> Toolkit | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        nvcc = shutil.which("nvcc", path=str(Path(named) / "bin"))
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Toolkit(nvcc) if nvcc else None


def wants_cuda(toolkit: Toolkit | None, torch_version: str, torch_cuda: str | None) -> bool:
    """Returns whether to build the CUDA kernels and prints why. Exits if they are required but cannot be built."""
    has_nvcc = f"found (CUDA {toolkit.version})" if toolkit else "missing (set CUDA_HOME)"
    has_torch = f"torch {torch_version}: {f'CUDA {torch_cuda}' if torch_cuda else 'a build without CUDA'}"
    possible = toolkit is not None and torch_cuda is not None and _major(toolkit.version) == _major(torch_cuda)
    wanted = switch("LIT_DID_CUDA")
    if wanted and not possible:
        sys.exit(
            "LIT_DID_CUDA=1 requires the CUDA kernels. They need nvcc and a CUDA build of torch of the same major "
            f"version, but got nvcc: {has_nvcc}, {has_torch}. Install these, or unset LIT_DID_CUDA."
        )
    cuda = possible and wanted is not False
    why = "LIT_DID_CUDA=0" if wanted is False else f"nvcc: {has_nvcc}, {has_torch}"
    print(f"lit-did: building {'with' if cuda else 'without'} CUDA for torch {torch_version} ({why})", file=sys.stderr)
    return cuda


def _major(version: str) -> str:
    return version.split(".")[0]


def cuda_architectures(toolkit: Toolkit) -> str:
    """Returns TORCH_CUDA_ARCH_LIST, or our architectures that this nvcc knows, with PTX of the last for later GPUs."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ")
    if named:
        return named
    known = subprocess.run([toolkit.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return " ".join(name for name in CUDA_ARCHITECTURES if f"sm_{name.replace('.', '')}" in known) + "+PTX"


def headers_that_torch_brings(toolkit: Toolkit) -> list[str]:
    """Returns flags for headers that torch needs but the toolkit lacks, such as cuSPARSE's.

    torch's nvidia packages have them. With -idirafter, the toolkit's own come first, so that versions do not mix.
    """
    packages = importlib.util.find_spec("nvidia")
    if (toolkit.home / "include/cusparse.h").exists() or packages is None:
        return []
    folders = [folder for root in packages.submodule_search_locations for folder in Path(root).glob("*/include")]
    return [flag for folder in sorted(folders) for flag in ("-idirafter", str(folder))]


# ----------------------------------------------------------------------------------------------------------
# CPU
# ----------------------------------------------------------------------------------------------------------


def levels_define() -> list[str]:
    return ["-DLIT_DID_HAS_X86_LEVELS"] if IS_X86 else []


def compile_rows(build_folder: Path) -> list[str]:
    """Compiles one object file for each instruction set. These sources include neither torch nor Python."""
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
