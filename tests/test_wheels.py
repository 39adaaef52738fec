"""What `make wheels` makes, installed into environments outside the clone, which pip fills from the network.

LIT_DID_OTHER_PYTHON may name a Python with another torch: the wheel's library then gives the same bits there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, run_program

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("make") is None or not (ROOT / "MANIFEST.in").is_file(),
        reason="needs Linux, make and a clone",
    ),
]
OPERATORS = ("token_statistics", "errors", "support", "determinism", "sequence_reduction")


def outside(python: Path, **changed: str) -> dict[str, str]:
    """The environment of a program that sees neither the clone nor a compiler."""
    left_out = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "CXX", "CC", "LIT_DID_EXTENSION", "LIT_DID_CUDA")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"PATH": str(python.parent)} | changed


def make_python(folder: Path, *packages: object) -> Path:
    """The Python of a new virtual environment with `packages`, in the versions of constraints.txt."""
    run_program(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    if packages:
        pinned = ("--constraint", ROOT / "constraints.txt")
        run_program(python, "-m", "pip", "install", "-q", *pinned, *packages, environment=outside(python), timeout=1800)
    return python


@pytest.fixture(scope="module")
def dist() -> Path:
    """The folder of the wheel and the source distribution."""
    environment = outside(Path(sys.executable)) | {"PATH": os.environ["PATH"]}
    run_program("make", "wheels", f"PYTHON={sys.executable}", "ARGS=--zig", environment=environment, timeout=3600)
    return ROOT / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob(f"lit_did-*-cp{sys.version_info.major}{sys.version_info.minor}-*.whl")
    return found


@pytest.fixture(scope="module")
def archive(dist) -> Path:
    (found,) = dist.glob("lit_did-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel and with this torch."""
    folder = tmp_path_factory.mktemp("installed")
    return make_python(folder, f"{wheel}[audit,demo,trl]", f"torch=={torch.__version__}", "pytest")


@pytest.fixture(scope="module")
def tests_folder(tmp_path_factory) -> Path:
    """A folder with the tests and the pages, where `import lit_did` finds what is installed."""
    folder = tmp_path_factory.mktemp("tests")
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_wheel(wheel):
    """It is for glibc 2.28, is small, and carries no library of torch."""
    assert re.search(r"-manylinux_2_28_\w+\.whl$", wheel.name)
    assert wheel.stat().st_size < 2_000_000
    with zipfile.ZipFile(wheel) as packed:
        libraries = sorted(name for name in packed.namelist() if ".so" in name)
    assert [re.sub(r"_C\..*", "_C", name) for name in libraries] == ["lit_did/_C", "lit_did/lib/lit_did_cpu.so"]


def test_operators(installed, tests_folder):
    files = [f"tests/ops/test_{name}.py" for name in OPERATORS]
    environment = outside(installed) | {"PATH": os.environ["PATH"]}  # with the compiler that torch.compile needs
    command = (installed, "-m", "pytest", "-q", "-x", *files, "tests/test_stable_abi.py")
    run_program(*command, environment=environment, cwd=tests_folder, timeout=3600)


def test_readme(installed, tests_folder):
    """Its snippets and commands, and the command `doctor`, where there is no compiler."""
    environment = outside(installed)
    assert shutil.which("c++", path=environment["PATH"]) is None
    page = "tests/test_docs_code.py"
    tests = [f"{page}::test_{kind}[README.md]" for kind in ("python", "commands")]
    command = (installed, "-m", "pytest", "-q", "-x", *tests)
    run_program(*command, environment=environment, cwd=tests_folder, timeout=3600)
    printed = run_program(installed.with_name("lit-did"), "doctor", environment=environment, cwd=tests_folder)
    assert re.search(r"^cpu tensors +fused operators", printed, re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------
# The source distribution
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git does not know the files")
def test_source_distribution_is_whole(archive):
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {name for name in tracked if (ROOT / name).exists()} - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def build(python: Path, *words: object, environment: dict[str, str]) -> str:
    """What pip and the build print. No wheel is taken that pip built before."""
    command = [str(word) for word in (python, "-m", "pip", *words, "--verbose", "--no-cache-dir", "--no-deps")]
    outside_the_clone, both = python.parent, {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run(command, env=environment, cwd=outside_the_clone, **both)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not-isolated"])
def test_source_distribution_without_torch_and_compiler(isolation, archive, tmp_path):
    """Pure Python, with a line that says so."""
    python = make_python(tmp_path, *([] if isolation else ["setuptools", "wheel"]))
    options = [] if isolation else ["--no-build-isolation"]
    printed = build(python, "install", *options, archive, environment=outside(python))
    (line,) = set(re.findall(r"lit-did: (building .*)", printed))
    assert line.startswith("building pure Python, without compiled operators, because these are missing: torch>=")
    assert "a C++ compiler (c++)" in line
    (package,) = tmp_path.glob("lib/python*/site-packages/lit_did")
    assert (package / "__init__.py").is_file()
    assert not list(package.rglob("*.so"))


def test_source_distribution_with_torch_and_compiler(archive, installed, tmp_path):
    """pip builds in an environment without torch, and finds the headers of the torch that is installed."""
    environment = outside(installed, LIT_DID_CUDA="0") | {"PATH": os.environ["PATH"]}
    printed = build(installed, "wheel", "--wheel-dir", tmp_path, archive, environment=environment)
    assert "lit-did: building without CUDA (LIT_DID_CUDA=0)" in printed
    assert "csrc/cpu/token_statistics.cpp" in printed, "the build says what it does"
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as packed:
        assert "lit_did/lib/lit_did_cpu.so" in packed.namelist()
