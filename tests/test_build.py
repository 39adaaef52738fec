"""Installs that are not as they should be: no extension, one for another torch, and builds that cannot work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import lit_did

ROOT = Path(__file__).parents[1]

needs_setup = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a clone: there is no setup.py")

# Prints what a user meets, as JSON: warnings at import, which backends serve, what "fused" says.
REPORT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, lit_did
    logits, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([1])
    log_ratio = lit_did.token_statistics(logits, torch.zeros(1, 2), labels).log_ratio.item()
ours = [[w.category.__name__, str(w.message)] for w in caught if "lit_did" in str(w.message)]
try:
    lit_did.token_statistics(logits, logits, labels, backend="fused")
    fused = "served"
except Exception as error:
    fused = f"{type(error).__name__}: {error}"
print(json.dumps({"file": lit_did.__file__, "warnings": ours, "log_ratio": log_ratio, "fused": fused}))
"""


def import_copy(folder, record=None, extension=False, broken_extension=False):
    """The report on a copy of the package in `folder`, with the given _build.json and the compiled library or none."""
    package = folder / "lit_did"
    ignored = ["__pycache__", "_build.json", *([] if extension else ["*.so", "*.pyd"])]
    shutil.copytree(Path(lit_did.__file__).parent, package, ignore=shutil.ignore_patterns(*ignored))
    if record is not None:
        (package / "_build.json").write_text(json.dumps(record))
    if broken_extension:
        (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert Path(report["file"]).is_relative_to(folder), "imported another copy"
    return report


def assert_the_reference_serves(report, *words):
    """One warning, with `words` in it; "auto" computes; "fused" says what there is."""
    assert len(report["warnings"]) == 1, report["warnings"]
    category, message = report["warnings"][0]
    assert category == "RuntimeWarning"
    for word in (torch.__version__, "pip install", *words):
        assert word in message
    assert report["log_ratio"] == pytest.approx(0.37989, abs=1e-4)  # log(2 / (1 + 1/e))
    assert report["fused"].startswith(
        "RuntimeError: Expected a fused operator for `backend='fused'` on cpu, but this install has: reference."
    )
    assert "pip install" in report["fused"]


def test_without_the_extension(tmp_path):
    assert_the_reference_serves(import_copy(tmp_path), "is not built")


def test_extension_for_another_torch(tmp_path):
    """The library is there but is not loaded: against another torch it could crash."""
    report = import_copy(tmp_path, {"torch": "1.0.0", "cuda": None}, extension=True)
    assert list((tmp_path / "lit_did").glob("_C*")), "the premise: the library was copied"
    assert_the_reference_serves(report, "built for torch 1.0.0")


def test_extension_that_does_not_load(tmp_path):
    """A library that the loader refuses: here no library at all, but in its place."""
    report = import_copy(tmp_path, {"torch": torch.__version__, "cuda": None}, broken_extension=True)
    assert_the_reference_serves(report, "does not load", "_C")


def test_the_copy_as_it_should_be(tmp_path):
    """The control: with the right record and the library, no word and the fused operators."""
    report = import_copy(tmp_path, {"torch": torch.__version__, "cuda": None}, extension=True)
    assert report["warnings"] == []
    assert report["fused"] == "served"


# ----------------------------------------------------------------------------------------------------------
# setup.py: asked for the name alone, it decides what to build and builds nothing
# ----------------------------------------------------------------------------------------------------------


def setup_py(*python_options, blocked=None, **environment):
    """`python setup.py --name`; `blocked`: a module that cannot be imported there."""
    code = (
        "import sys, runpy\n"
        f"if {blocked!r}: sys.modules[{blocked!r}] = None\n"  # None makes `import` raise ModuleNotFoundError
        "sys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LIT_DID_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *python_options, "-c", code],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def last_line(result):
    """What a failed setup ends with: one sentence, and no traceback above it."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@needs_setup
def test_setup():
    result = setup_py(LIT_DID_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "lit-did"
    assert f"building without CUDA for torch {torch.__version__}" in result.stderr


@needs_setup
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build here")
def test_cuda_required_but_missing():
    message = last_line(setup_py(LIT_DID_CUDA="1"))
    assert message.startswith("LIT_DID_CUDA=1 requires the CUDA kernels. They need nvcc and a CUDA build of torch")
    assert f"torch {torch.__version__}: a build without CUDA" in message
    assert "nvcc: found" in message or "nvcc: missing (set CUDA_HOME)" in message


# Stands for nvcc: what setup.py asks of it, as CUDA {version} answers.
NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
  --list-gpu-code) printf '%s\\n' {architectures} ;;
esac
"""


# Stands for torch, so that it may be any build: setup.py asks for its version and hands it the extension to build.
TORCH = """
class version:
    cuda = {cuda!r}
__version__ = "9.9"
"""
CPP_EXTENSION = """
import os, sys
from setuptools import Extension
BuildExtension = object
def CUDAExtension(**arguments):
    print("CUDA_HOME", os.environ["CUDA_HOME"])
    print("TORCH_CUDA_ARCH_LIST", os.environ["TORCH_CUDA_ARCH_LIST"])
    print("cxx", *arguments["extra_compile_args"]["cxx"])
    return CppExtension(**arguments)
def CppExtension(extra_compile_args, **arguments):
    return Extension(**arguments)
"""


def cuda_setup(folder, nvcc="13.0", torch_cuda="13.0", architectures="sm_80 sm_90 sm_120", **environment):
    """setup.py with a toolkit of version `nvcc` (None: no nvcc) and a torch that was built for `torch_cuda`."""
    home, torch_utils = folder / "toolkit", folder / "torch/utils"
    (home / "bin").mkdir(parents=True)
    torch_utils.mkdir(parents=True)
    if nvcc:
        script(home / "bin/nvcc", NVCC.format(home=home, version=nvcc, architectures=architectures))
    (folder / "torch/__init__.py").write_text(TORCH.format(cuda=torch_cuda))
    (torch_utils / "__init__.py").touch()
    (torch_utils / "cpp_extension.py").write_text(CPP_EXTENSION)
    environment = {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "", "PYTHONPATH": str(folder)} | environment
    return setup_py(**environment)


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def cuda_lines(result):
    """What the build says of CUDA."""
    assert result.returncode == 0, result.stderr
    return [line.removeprefix("lit-did: ") for line in result.stderr.splitlines() if line.startswith("lit-did: ")]


@needs_setup
@pytest.mark.parametrize("switch", [{}, {"LIT_DID_CUDA": "1"}], ids=["unset", "demanded"])
@pytest.mark.parametrize("nvcc", ["13.0", "13.2"])
def test_cuda_where_it_can_be(nvcc, switch, tmp_path):
    """Another minor version will do. Of our architectures, those that this nvcc knows."""
    result = cuda_setup(tmp_path, nvcc, "13.0", **switch)
    assert cuda_lines(result) == [
        f"building with CUDA for torch 9.9 (nvcc: found (CUDA {nvcc}), torch 9.9: CUDA 13.0)",
        "CUDA architectures 8.0 9.0 12.0+PTX",
    ]
    assert "TORCH_CUDA_ARCH_LIST 8.0 9.0 12.0+PTX" in result.stdout
    assert f'-DLIT_DID_CUDA_VERSION="{nvcc}"' in result.stdout
    assert '-DLIT_DID_CUDA_ARCHITECTURES="8.0 9.0 12.0+PTX"' in result.stdout


@needs_setup
def test_named_architectures(tmp_path):
    result = cuda_setup(tmp_path, TORCH_CUDA_ARCH_LIST="8.6;9.0+PTX")
    assert cuda_lines(result)[1] == "CUDA architectures 8.6 9.0+PTX"
    assert "TORCH_CUDA_ARCH_LIST 8.6 9.0+PTX" in result.stdout


@needs_setup
@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "why"),
    [
        (None, "13.0", "nvcc: missing (set CUDA_HOME), torch 9.9: CUDA 13.0"),
        ("12.8", "13.0", "nvcc: found (CUDA 12.8), torch 9.9: CUDA 13.0"),
        ("13.0", None, "nvcc: found (CUDA 13.0), torch 9.9: a build without CUDA"),
    ],
    ids=["no-nvcc", "another-version", "no-cuda-in-torch"],
)
def test_cuda_where_it_cannot_be(nvcc, torch_cuda, why, tmp_path):
    """Left out with a reason printed. An error if it is required."""
    expected = [f"building without CUDA for torch 9.9 ({why})"]
    assert cuda_lines(cuda_setup(tmp_path / "unset", nvcc, torch_cuda)) == expected
    assert last_line(cuda_setup(tmp_path / "demanded", nvcc, torch_cuda, LIT_DID_CUDA="1")) == (
        "LIT_DID_CUDA=1 requires the CUDA kernels. They need nvcc and a CUDA build of torch of the same major version, "
        f"but got {why}. Install these, or unset LIT_DID_CUDA."
    )


@needs_setup
def test_cuda_left_out(tmp_path):
    lines = cuda_lines(cuda_setup(tmp_path, LIT_DID_CUDA="0"))
    assert lines == ["building without CUDA for torch 9.9 (LIT_DID_CUDA=0)"]


@needs_setup
def test_nvcc_that_calls_another(tmp_path):
    """A script on PATH that stands for nvcc: the toolkit is where the real one says, not beside the script."""
    (tmp_path / "path").mkdir()
    script(tmp_path / "path/nvcc", f'#!/bin/sh\nexec {tmp_path}/toolkit/bin/nvcc "$@"\n')
    path = f"{tmp_path}/path{os.pathsep}{os.environ['PATH']}"
    result = cuda_setup(tmp_path, CUDA_HOME="", CUDA_PATH="", PATH=path)
    assert cuda_lines(result)[0].startswith("building with CUDA")
    assert f"CUDA_HOME {tmp_path}/toolkit\n" in result.stdout


@needs_setup
@pytest.mark.parametrize("toolkit_has_them", [False, True])
def test_headers_that_torch_brings(toolkit_has_them, tmp_path):
    """torch's headers include cuSPARSE's: of torch's own packages where the toolkit is without, after the toolkit's."""
    (tmp_path / "nvidia/cu13/include").mkdir(parents=True)
    if toolkit_has_them:
        (tmp_path / "toolkit/include").mkdir(parents=True)
        (tmp_path / "toolkit/include/cusparse.h").touch()
    result = cuda_setup(tmp_path)
    assert result.returncode == 0, result.stderr
    assert (f"-idirafter {tmp_path}/nvidia/cu13/include" in result.stdout) is not toolkit_has_them
