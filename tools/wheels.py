"""`make wheels`: builds the source distribution and the wheels into dist/. ARGS=--cuda adds the CUDA kernels' wheel.

Where containers run, cibuildwheel builds the wheels, as pyproject.toml says. Elsewhere zig compiles, for the Pythons
that are found. zig's clang links against an old glibc, and links its own C++ library in. Each wheel has a `lit_did._C`
of its own. The libraries, which need no Python, are compiled once. auditwheel checks which machines the wheels run on.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path

from setuptools.config.expand import read_attr

PACKAGES = Path(sysconfig.get_path("purelib"))  # torch, setuptools, pybind11, ninja and build, for every Python here
WORK, DIST = Path("build/wheels").resolve(), Path("dist")
PYTHONS = [f"3.{minor}" for minor in range(11, 15)]
MACHINE = platform.machine()
GLIBC = "2.28"
LIMIT = 2_000_000  # bytes of a wheel without CUDA
# What `import torch` loads before it loads ours.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart.so*")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds everything in build/wheels, then moves it to dist/."""
    parser = argparse.ArgumentParser(prog="python -m tools.wheels", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cuda", action="store_true", help="also the wheel of the CUDA kernels: many minutes")
    parser.add_argument("--zig", action="store_true", help="no container: for the Pythons here, in a minute or two")
    options = parser.parse_args(arguments)
    for name in ("source", "raw", "done"):
        shutil.rmtree(WORK / name, ignore_errors=True)
        (WORK / name).mkdir(parents=True)
    say("the source distribution")
    Path("lit_did.egg-info/SOURCES.txt").unlink(missing_ok=True)  # setuptools would add the files that it lists
    build("--sdist", ".", WORK / "done", env=os.environ | {"LIT_DID_EXTENSION": "0"})
    (archive,) = (WORK / "done").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(WORK / "source", filter="data")
    (source,) = (WORK / "source").iterdir()

    left_out = [] if options.cuda else ["CUDA (ARGS=--cuda builds it)"]
    engine = next((name for name in ("docker", "podman") if not options.zig and succeeds(name, "info")), None)
    if engine:
        say(f"wheels in a container of {engine}, by cibuildwheel")
        environment = os.environ | {"CIBW_CONTAINER_ENGINE": engine}
        run(
            sys.executable,
            "-m",
            "cibuildwheel",
            "--platform=linux",
            "--output-dir",
            WORK / "done",
            source,
            env=environment,
        )
    elif sys.platform != "linux":
        sys.exit("wheels: Expected Linux, docker or podman, but found none of them.")
    else:
        found = {version: python for version in PYTHONS if (python := find_python(version))}
        left_out += [f"CPython {version} (not found)" for version in PYTHONS if version not in found]
        for version, python in found.items():
            say(f"the wheel for CPython {version}, with zig")
            build("--wheel", source, WORK / "raw", python=python, env=compiling(LIT_DID_CUDA="0"))
    if options.cuda:
        say("the wheel of the CUDA kernels")
        run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=source, env=compiling(LIT_DID_CUDA="1"))
        for library in source.glob("build/lib*/lit_did/lib/lit_did_cuda*.so"):
            pack(library)
    for wheel in (WORK / "raw").glob("*.whl"):
        excluded = [f"--exclude={name}" for name in OF_TORCH]
        tag = f"manylinux_{GLIBC.replace('.', '_')}_{MACHINE}"
        run("auditwheel", "repair", "--plat", tag, "--only-plat", *excluded, "--wheel-dir", WORK / "done", wheel)
    for wheel in (WORK / "done").glob("lit_did-*.whl"):
        if wheel.stat().st_size > LIMIT:
            sys.exit(f"wheels: {wheel.name} has {wheel.stat().st_size} bytes, more than {LIMIT}.")

    for old in DIST.glob("lit_did*"):
        old.unlink()
    DIST.mkdir(exist_ok=True)
    for path in sorted((WORK / "done").iterdir()):
        say(f"{DIST / path.name}: {path.stat().st_size / 1e6:.2f} MB")
        path.replace(DIST / path.name)
    if left_out:
        say(f"not built: {', '.join(left_out)}")


def say(text: str) -> None:
    print(f"wheels: {text}", flush=True)


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    if subprocess.run(words, cwd=cwd, env=env).returncode:
        sys.exit(f"wheels: this failed, and {DIST}/ was left as it was: {' '.join(words)}")


def succeeds(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def build(kind: str, source: object, folder: Path, env: dict[str, str], python: str = sys.executable) -> None:
    """Runs `python -m build`. Without --quiet it would print a line for every file that it copies."""
    quiet = "--config-setting=--global-option=--quiet"
    run(python, "-m", "build", kind, "--no-isolation", quiet, "--outdir", folder, source, env=env)


def find_python(version: str) -> str | None:
    """This Python or the `python3.X` on PATH, if it works and has the headers for extension modules."""
    python = sys.executable if sys.version_info[:2] == (3, int(version[2:])) else f"python{version}"
    code = "import sysconfig; open(sysconfig.get_path('include') + '/Python.h')"
    return python if succeeds(python, "-c", code) else None


def compiling(**switches: str) -> dict[str, str]:
    """The environment of a build with zig. All builds share their objects."""
    config = WORK / "build.cfg"
    config.write_text(f"[build]\nbuild_temp = {WORK / 'objects'}\n")
    target = f"{MACHINE}-linux-gnu.{GLIBC}"
    return (
        os.environ
        | switches
        | {
            "LIT_DID_EXTENSION": "1",
            "CXX": f"{sys.executable} -m ziglang c++ -target {target}",
            "LDFLAGS": "-s",  # without symbols for debuggers
            "PYTHONPATH": str(PACKAGES),
            "DIST_EXTRA_CONFIG": str(config),
        }
    )


def pack(library: Path) -> None:
    """Makes a wheel of a CUDA library: the package lit_did_cuda13, where lit_did looks for it."""
    package = library.stem
    name, version = package.replace("_", "-"), read_attr("lit_did.__version__", root_dir=".")
    folder = WORK / "raw" / package
    (folder / package).mkdir(parents=True)
    shutil.copy(library, folder / package)
    text = f'"""The kernels of lit_did for CUDA {package[-2:]}."""\n\n__version__ = "{version}"\n'
    (folder / package / "__init__.py").write_text(text)
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: Apache-2.0\nRequires-Python: >=3.11\n"
        f"Summary: The CUDA kernels of lit-did, for PyTorch built with CUDA {package[-2:]}\n"
        f"Requires-Dist: lit-did=={version}\n"
    )
    (info / "WHEEL").write_text(
        f"Wheel-Version: 1.0\nGenerator: lit-did\nRoot-Is-Purelib: false\nTag: py3-none-linux_{MACHINE}\n"
    )
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", WORK / "raw", folder)


if __name__ == "__main__":
    main()
