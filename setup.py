"""Builds the compiled operators: libraries in lit_did/lib, and the module lit_did._C. All else is in pyproject.toml.

The libraries use torch through its stable ABI alone. They run under every torch from OLDEST_TORCH on, and need no
Python: lit_did/lib/lit_did_cpu.so, and lit_did/lib/lit_did_cuda13.so where nvcc of CUDA 13 is found.

Environment variables:
    LIT_DID_EXTENSION: 0 installs pure Python. 1 requires the compiled operators. Unset, they are built if torch,
        pybind11, ninja and a C++ compiler are found.
    LIT_DID_CUDA: 1 requires the CUDA library, for which nvcc suffices. 0 leaves it out. Unset, it is built if nvcc and
        a CUDA build of torch of the same major version are found.
    CUDA_HOME: The CUDA toolkit. nvcc is CUDA_HOME/bin/nvcc.
    TORCH_CUDA_ARCH_LIST: The GPU architectures to compile for.
    CXX, CXXFLAGS, LDFLAGS: The C++ compiler, and further flags for it.
    MAX_JOBS: How many compilers run at once. Unset, one for each processor.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)  # the first whose stable ABI has all that the operators need
CSRC = Path("csrc")
ON_MACOS = sys.platform == "darwin"
# The row kernels are compiled once for each instruction set.
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def main() -> None:
    build = plan()
    libraries = [] if build is None else build.libraries
    setup(
        license="Apache-2.0",
        ext_modules=[Extension(name, inputs) for name, inputs in libraries],
        cmdclass={"build_ext": type("BuildLibraries", (BuildLibraries,), {"build": build})},
    )


def say(text: str) -> None:
    print(f"lit-did: {text}", file=sys.stderr, flush=True)


def switch(name: str) -> bool | None:
    """Returns an environment variable: True for 1, False for 0, None if it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"Expected the environment variable {name} to be 0 or 1, but got {value!r}.")
    return None if value == "" else value == "1"


# ----------------------------------------------------------------------------------------------------------
# What to build
# ----------------------------------------------------------------------------------------------------------


class Torch:
    """The installed torch, whose headers are used. It is not imported."""

    def __init__(self, folder: Path):
        facts = runpy.run_path(str(folder / "version.py"))
        self.version: str = facts["__version__"]
        self.cuda: str | None = facts["cuda"]
        self.include = folder / "include"
        self.lib = folder / "lib"

    @property
    def is_new_enough(self) -> bool:
        return tuple(int(number) for number in re.findall(r"\d+", self.version)[:2]) >= OLDEST_TORCH


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

    @cached_property
    def architectures(self) -> list[str]:
        """TORCH_CUDA_ARCH_LIST, or our architectures that this nvcc knows, with PTX of the last for later GPUs."""
        named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        if named:
            return named
        known = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        ours = [name for name in CUDA_ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
        return [*ours[:-1], f"{ours[-1]}+PTX"]


def plan() -> "Build | None":
    """Returns what to build, or None for pure Python, and says why. Exits if what is required cannot be built."""
    wanted, cuda_wanted = switch("LIT_DID_EXTENSION"), switch("LIT_DID_CUDA")
    required = "LIT_DID_EXTENSION" if wanted else "LIT_DID_CUDA" if cuda_wanted else None
    if wanted is False:
        say("building pure Python, without compiled operators (LIT_DID_EXTENSION=0)")
        return None
    if sys.platform == "win32":
        if required:
            sys.exit(f"{required}=1 requires the compiled operators, but they are for Linux and macOS.")
        say("building pure Python, without compiled operators: they are for Linux and macOS")
        return None
    torch = find_torch()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    at_least = ".".join(map(str, OLDEST_TORCH))
    found = {
        f"torch>={at_least}": torch is not None and torch.is_new_enough,
        "pybind11": find_spec("pybind11") is not None,
        "ninja": find_spec("ninja") is not None or shutil.which("ninja") is not None,
        f"a C++ compiler ({compiler[0]})": shutil.which(compiler[0]) is not None,
    }
    missing = ", ".join(name for name, is_there in found.items() if not is_there)
    if missing:
        remedy = "To build them, install what is missing, then lit-did again."
        if required:
            sys.exit(f"{required}=1 requires the compiled operators, but these are missing: {missing}. {remedy}")
        say(f"building pure Python, without compiled operators, because these are missing: {missing}. {remedy}")
        return None
    return Build(torch, compiler, find_toolkit(torch, cuda_wanted))


def find_torch() -> Torch | None:
    """Returns the torch of the environment that lit-did is installed into.

    pip builds in an environment of its own. Python does not import torch there, but knows where it is.
    """
    package = find_spec("torch")
    folders = list(package.submodule_search_locations) if package else []
    folders += [f"{sysconfig.get_path(kind)}/torch" for kind in ("purelib", "platlib")]
    return next((Torch(Path(folder)) for folder in folders if Path(folder, "version.py").is_file()), None)


def find_toolkit(torch: Torch, wanted: bool | None) -> Toolkit | None:
    """Returns the toolkit to build the CUDA library with, or None, and says why. Exits if it is required."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        nvcc = shutil.which("nvcc", path=str(Path(named) / "bin"))
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    toolkit = Toolkit(nvcc) if nvcc and wanted is not False else None
    has_nvcc = f"found (CUDA {toolkit.version})" if toolkit else "missing (set CUDA_HOME)"
    has_torch = f"torch {torch.version}: {f'CUDA {torch.cuda}' if torch.cuda else 'a build without CUDA'}"
    if wanted and toolkit is None:
        sys.exit(f"LIT_DID_CUDA=1 requires the CUDA library, which needs nvcc, but got nvcc: {has_nvcc}.")
    fits = toolkit is not None and torch.cuda is not None and toolkit.version.split(".")[0] == torch.cuda.split(".")[0]
    why = f"LIT_DID_CUDA={int(wanted)}" if wanted is not None else f"nvcc: {has_nvcc}, {has_torch}"
    if not (wanted or fits):
        say(f"building without CUDA ({why})")
        return None
    say(f"building with CUDA {toolkit.version} for {' '.join(toolkit.architectures)} ({why}): some minutes")
    return toolkit


def gencode_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for architectures as TORCH_CUDA_ARCH_LIST names them: 9.0, 9.0a, 12.0+PTX."""
    flags = []
    for name in architectures:
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", name)
        if not match:
            sys.exit(f"Expected TORCH_CUDA_ARCH_LIST to hold numbers such as 9.0 or 12.0+PTX, but got {name!r}.")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# ----------------------------------------------------------------------------------------------------------
# How
# ----------------------------------------------------------------------------------------------------------


class Build:
    """The commands, as a file for ninja: it compiles in parallel, and only what has changed."""

    def __init__(self, torch: Torch, compiler: list[str], toolkit: Toolkit | None):
        self.torch, self.compiler, self.toolkit = torch, compiler, toolkit
        target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True).stdout
        self.levels = {name: LEVELS[name] for name in LEVELS if name == "baseline" or target.startswith("x86_64")}
        self.libraries = [("lit_did._C", ["csrc/module.cpp", "csrc/cpu/levels.cpp"])]
        self.libraries.append(("lit_did.lib.lit_did_cpu", self._sources("*.cpp", "cpu/*.cpp")))
        if toolkit:
            cuda = ["csrc/checks.cpp", *self._sources("cuda/*.cpp", "cuda/*.cu")]
            self.libraries.append((f"lit_did.lib.lit_did_cuda{toolkit.version.split('.')[0]}", cuda))

    def _sources(self, *patterns: str) -> list[str]:
        found = sorted(path.as_posix() for pattern in patterns for path in CSRC.glob(pattern))
        levels = [f"csrc/cpu/rows_{name}.cpp" for name in self.levels]
        return [path for path in found if path != "csrc/module.cpp" and ("rows_" not in path or path in levels)]

    def run(self, folder: Path, outputs: dict[str, str]) -> None:
        """Builds each library to its path in `outputs`, with objects in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(folder, outputs))
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        status = {"NINJA_STATUS": "lit-did: [%f/%t] "} | os.environ
        if subprocess.run([*ninja, "-f", str(folder / "build.ninja"), *jobs], env=status).returncode:
            sys.exit("lit-did: the compiled operators could not be built: see the compiler's message above.")

    def ninja_file(self, folder: Path, outputs: dict[str, str]) -> str:
        lines = [
            f"builddir = {escaped(folder)}",
            "rule compile",
            "  command = $run -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule link",
            "  command = $run $in $last -o $out",
            "  description = $out",
        ]
        for name, inputs in self.libraries:
            objects = []
            for source in inputs:
                path = escaped(folder / name / f"{Path(source).stem}{Path(source).suffix.replace('.', '_')}.o")
                lines += [
                    f"build {path}: compile {escaped(source)}",
                    f"  run = {escaped_command(self.compile(source))}",
                ]
                objects.append(path)
            link, last = self.link(name, folder)
            lines += [
                f"build {escaped(outputs[name])}: link {' '.join(objects)}",
                f"  run = {escaped_command(link)}",
                f"  last = {escaped_command(last)}",
            ]
        return "\n".join(lines) + "\n"

    def compile(self, source: str) -> list[str]:
        """The command that compiles one file, without its input and output."""
        path = Path(source)
        if path.suffix == ".cu":  # the kernels do not include torch; `make cuda-check` has the same flags
            flags = (CSRC / "cuda/nvcc_flags.txt").read_text().split()
            host = [f"-ccbin={self.compiler[0]}"] if "CXX" in os.environ and len(self.compiler) == 1 else []
            # nvcc compiles one file for several architectures at once. 0: for as many as there are processors.
            own = [f"--threads={os.environ.get('MAX_JOBS') or 0}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            return [self.toolkit.nvcc, *host, *flags, *own, *gencode_flags(self.toolkit.architectures)]
        own_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        command = [*self.compiler, "-O3", "-fPIC", "-fvisibility=hidden", *own_flags]
        if "avx2" in self.levels:
            command.append("-DLIT_DID_HAS_X86_LEVELS")
        if path.stem.startswith("rows_"):
            return [*command, "-std=c++17", "-Wno-psabi", *self.levels[path.stem.removeprefix("rows_")]]
        command.append("-std=c++20")
        if source == "csrc/module.cpp":
            import pybind11

            headers = sysconfig.get_paths()["include"]
            command += [f"-I{pybind11.get_include()}", f"-I{headers}"]
            # Debian's headers of Python include <x86_64-linux-gnu/...> from /usr/include, which zig does not search.
            command += ["-idirafter", str(Path(headers).parent)]
            return [*command, f'-DLIT_DID_OLDEST_TORCH="{".".join(map(str, OLDEST_TORCH))}"']
        target = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}" + 12 * "0"
        command += [f"-DTORCH_TARGET_VERSION={target}", "-isystem", str(self.torch.include)]
        if path.parent.name == "cuda":
            command += [
                *("-DUSE_CUDA", "-isystem", str(self.toolkit.home / "include")),
                f'-DLIT_DID_CUDA_VERSION="{self.toolkit.version}"',
                f'-DLIT_DID_CUDA_ARCHITECTURES="{" ".join(self.toolkit.architectures)}"',
            ]
        return command

    def link(self, name: str, folder: Path) -> tuple[list[str], list[str]]:
        """The command that links a library: what stands before its objects, and what stands behind them."""
        exported = [] if ON_MACOS else ["-Wl,--version-script=csrc/exported.map"]
        command = [*self.compiler, "-shared", *exported, *shlex.split(os.environ.get("LDFLAGS", ""))]
        if name == "lit_did._C":
            return command, ["-Wl,-undefined,dynamic_lookup"] if ON_MACOS else []
        if "cuda" in name:
            runtime = [*(f"-L{self.toolkit.home / lib}" for lib in ("lib64", "lib")), "-lcudart"]
            return command, [*self.needed(folder, "torch_cpu", "torch_cuda"), *runtime]
        return command, self.needed(folder, "torch_cpu")

    def needed(self, folder: Path, *libraries: str) -> list[str]:
        """What makes a library need torch's, which `import torch` has loaded.

        On Linux their names suffice: stubs with these names stand for them, so that no torch of the target's processor
        or with CUDA must be installed.
        """
        if ON_MACOS:
            return [f"-L{self.torch.lib}", *(f"-l{name}" for name in libraries)]
        words = ["-Wl,--no-as-needed"]
        for name in libraries:
            stub = str(folder / f"lib{name}.so")
            nothing = ["-shared", "-nostdlib", f"-Wl,-soname,lib{name}.so", "-x", "c++", os.devnull, "-o", stub]
            subprocess.run([*self.compiler, *nothing], check=True)
            words.append(stub)
        return [*words, "-Wl,--as-needed"]


def escaped(path: object) -> str:
    """A path as a ninja file has it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def escaped_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


class BuildLibraries(build_ext):
    """Runs ninja instead of setuptools' compiler. setuptools puts the results where the package is built."""

    build: Build | None

    def get_ext_filename(self, fullname: str) -> str:
        # Without the tag of an interpreter, which these libraries do not need.
        if fullname.split(".")[-1].startswith("lit_did_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        outputs = {extension.name: self.get_ext_fullpath(extension.name) for extension in self.extensions}
        self.build.run(Path(self.build_temp), outputs)

    def copy_extensions_to_source(self) -> None:
        Path("lit_did/lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


if __name__ == "__main__":
    main()
