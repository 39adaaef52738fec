"""Installs that are not as they should be: no extension, an older torch, libraries that do not load, and builds that
cannot work."""

from __future__ import annotations

import json
import os
import runpy
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

# Prints what a user meets, as JSON: warnings at import, which backends serve, what "fused" says, what CUDA tensors get.
REPORT = """
import json, sys, warnings
import torch
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lit_did
    logits, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([1])
    log_ratio = lit_did.token_statistics(logits, torch.zeros(1, 2), labels).log_ratio.item()
ours = [[w.category.__name__, str(w.message)] for w in caught if "lit_did" in str(w.message)]
try:
    lit_did.token_statistics(logits, logits, labels, backend="fused")
    fused = "served"
except Exception as error:
    fused = f"{{type(error).__name__}}: {{error}}"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lit_did.ops.extension.choose_backend("auto", torch.device("cuda"), ())
on_cuda = [str(w.message) for w in caught]
print(json.dumps(
    {{"file": lit_did.__file__, "warnings": ours, "log_ratio": log_ratio, "fused": fused, "on_cuda": on_cuda}}
))
"""


def import_copy(folder, without=(), broken=(), before=""):
    """The report on a copy of the package in `folder`.

    Args:
        without: Patterns of files that are not copied.
        broken: Names of files that take the place of libraries, and are none.
        before: What Python runs before `import lit_did`.
    """
    package = folder / "lit_did"
    ignored = shutil.ignore_patterns("__pycache__", *without)
    shutil.copytree(Path(lit_did.__file__).parent, package, ignore=ignored)
    for name in broken:
        (package / name).write_bytes(b"no library")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", REPORT.format(before=before)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
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
    for word in ("this is torch", "pip install", *words):
        assert word in message
    assert report["log_ratio"] == pytest.approx(0.37989, abs=1e-4)  # log(2 / (1 + 1/e))
    assert report["fused"].startswith(
        "RuntimeError: Expected a fused operator for `backend='fused'` on cpu, but this install has: reference."
    )
    assert "pip install" in report["fused"]
    assert report["on_cuda"] == []


def test_without_the_extension(tmp_path):
    assert_the_reference_serves(import_copy(tmp_path, without=["*.so"]), "is not built", torch.__version__)


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1+cu128"])
def test_older_torch(version, tmp_path):
    """The library is there but is not loaded: an older torch lacks what it needs."""
    report = import_copy(tmp_path, before=f"torch.__version__ = {version!r}")
    assert (tmp_path / "lit_did/lib/lit_did_cpu.so").is_file(), "the premise: the library was copied"
    assert_the_reference_serves(report, "needs torch 2.11 or newer", f"this is torch {version}", "torch>=2.11")


@pytest.mark.parametrize("version", ["2.11.0+cpu", "2.100.0", "3.0.1"])
def test_another_torch(version, tmp_path):
    report = import_copy(tmp_path, before=f"torch.__version__ = {version!r}")
    assert report["warnings"] == []
    assert report["fused"] == "served"


@pytest.mark.parametrize("name", [f"_C{EXTENSION_SUFFIXES[0]}", "lib/lit_did_cpu.so"])
def test_extension_that_does_not_load(name, tmp_path):
    """A file that the loader refuses: here no library at all, but in its place."""
    assert_the_reference_serves(import_copy(tmp_path, broken=[name]), "does not load", Path(name).name)


def test_cuda_library_that_does_not_load(tmp_path):
    """`import lit_did` says nothing: it is the first CUDA tensor that gets a warning."""
    report = import_copy(tmp_path, broken=["lib/lit_did_cuda99.so"], before="torch.version.cuda = '99.1'")
    assert report["warnings"] == []
    assert report["fused"] == "served"
    (warning,) = report["on_cuda"]
    assert "for cuda tensors, because the kernels for CUDA 99 do not load (" in warning
    assert "lit_did_cuda99.so" in warning


def test_cuda_library_for_another_version(tmp_path):
    report = import_copy(tmp_path, broken=["lib/lit_did_cuda98.so"], before="torch.version.cuda = '99.1'")
    assert report["warnings"] == []
    (warning,) = report["on_cuda"]
    assert "for cuda tensors, because no kernels for CUDA 99 are installed." in warning


@pytest.mark.parametrize("of", [lit_did.__version__, "0.0.7"])
def test_cuda_library_of_its_own_wheel(of, tmp_path):
    """It is looked for, if it has the version of lit_did. Here it is no library."""
    package = tmp_path / "lit_did_cuda99"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {of!r}\n")
    (package / "lit_did_cuda99.so").write_bytes(b"no library")
    report = import_copy(tmp_path, before="torch.version.cuda = '99.1'")
    assert report["warnings"] == []
    (warning,) = report["on_cuda"]
    if of == lit_did.__version__:
        assert "the kernels for CUDA 99 do not load (" in warning
        assert str(package / "lit_did_cuda99.so") in warning
    else:
        assert f"lit-did-cuda99 has version 0.0.7, but lit-did has {lit_did.__version__}." in warning


def test_windows(tmp_path):
    report = import_copy(tmp_path, before="sys.platform = 'win32'")
    (warning,) = report["warnings"]
    assert f"lit_did has no extension for Windows (this is torch {torch.__version__})" in warning[1]
    assert report["fused"].startswith("RuntimeError: Expected a fused operator")
    assert report["log_ratio"] == pytest.approx(0.37989, abs=1e-4)


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
    assert "lit-did: building without CUDA (LIT_DID_CUDA=0)\n" in result.stderr


@needs_setup
def test_pure_python():
    assert lines_of(setup_py(LIT_DID_EXTENSION="0")) == [
        "building pure Python, without compiled operators (LIT_DID_EXTENSION=0)"
    ]


@needs_setup
def test_pure_python_on_windows(monkeypatch, capsys):
    plan = runpy.run_path(str(ROOT / "setup.py"))["plan"]
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("LIT_DID_EXTENSION", raising=False)
    assert plan() is None
    why = "they are for Linux and macOS"
    assert capsys.readouterr().err == f"lit-did: building pure Python, without compiled operators: {why}\n"
    monkeypatch.setenv("LIT_DID_EXTENSION", "1")
    with pytest.raises(SystemExit, match=rf"^LIT_DID_EXTENSION=1 requires the compiled operators, but {why}\.$"):
        plan()


@needs_setup
@pytest.mark.parametrize(
    ("lacks", "name"),
    [
        ({"blocked": "pybind11"}, "pybind11"),
        ({"blocked": "ninja", "PATH": "/nowhere"}, "ninja, a C++ compiler (c++)"),
        ({"CXX": "no-compiler -m64"}, "a C++ compiler (no-compiler)"),
    ],
    ids=["pybind11", "ninja", "compiler"],
)
def test_something_is_missing(lacks, name):
    """Pure Python, with a line that says why. An error if the extension is required."""
    (line,) = lines_of(setup_py(**lacks))
    assert line.startswith(
        f"building pure Python, without compiled operators, because these are missing: {name}. To build"
    )
    assert last_line(setup_py(LIT_DID_EXTENSION="1", **lacks)).startswith(
        f"LIT_DID_EXTENSION=1 requires the compiled operators, but these are missing: {name}. To build"
    )


# Stands for nvcc: what setup.py asks of it, as CUDA {version} answers.
NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
  --list-gpu-code) printf '%s\\n' {architectures} ;;
esac
"""


def cuda_setup(folder, nvcc="13.0", torch_cuda="13.0", version="9.9", **environment):
    """setup.py with a toolkit of version `nvcc` (None: no nvcc) and a torch that was built for `torch_cuda`."""
    home = folder / "toolkit"
    (home / "bin").mkdir(parents=True)
    (folder / "torch").mkdir()
    if nvcc:
        text = NVCC.format(home=home, version=nvcc, architectures="sm_80 sm_90 sm_120")
        script(home / "bin/nvcc", text)
    (folder / "torch/__init__.py").write_text("raise ImportError('setup.py needs no more than the files of torch')")
    (folder / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {torch_cuda!r}\n")
    environment = {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "", "PYTHONPATH": str(folder)} | environment
    return setup_py(**environment)


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def lines_of(result):
    """What the build says."""
    assert result.returncode == 0, result.stderr
    return [line.removeprefix("lit-did: ") for line in result.stderr.splitlines() if line.startswith("lit-did: ")]


@needs_setup
@pytest.mark.parametrize("nvcc", ["13.0", "13.2"])
def test_cuda_where_it_can_be(nvcc, tmp_path):
    """Another minor version will do. Of our architectures, those that this nvcc knows."""
    why = f"nvcc: found (CUDA {nvcc}), torch 9.9: CUDA 13.0"
    assert lines_of(cuda_setup(tmp_path, nvcc, "13.0")) == [
        f"building with CUDA {nvcc} for 8.0 9.0 12.0+PTX ({why}): some minutes"
    ]


@needs_setup
@pytest.mark.parametrize("torch_cuda", ["13.0", "12.8", None])
def test_cuda_on_demand(torch_cuda, tmp_path):
    """It needs nvcc alone, so that a library for another torch can be built."""
    assert lines_of(cuda_setup(tmp_path, "13.0", torch_cuda, LIT_DID_CUDA="1")) == [
        "building with CUDA 13.0 for 8.0 9.0 12.0+PTX (LIT_DID_CUDA=1): some minutes"
    ]


@needs_setup
def test_cuda_on_demand_without_nvcc(tmp_path):
    assert last_line(cuda_setup(tmp_path, None, LIT_DID_CUDA="1")) == (
        "LIT_DID_CUDA=1 requires the CUDA library, which needs nvcc, but got nvcc: missing (set CUDA_HOME)."
    )


@needs_setup
def test_named_architectures(tmp_path):
    (line,) = lines_of(cuda_setup(tmp_path, TORCH_CUDA_ARCH_LIST="8.6;9.0+PTX"))
    assert line.startswith("building with CUDA 13.0 for 8.6 9.0+PTX (")


@needs_setup
def test_flags_of_architectures():
    gencode_flags = runpy.run_path(str(ROOT / "setup.py"))["gencode_flags"]
    assert gencode_flags(["7.5", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(SystemExit, match=r"to hold numbers such as .* but got 'Hopper'"):
        gencode_flags(["Hopper"])


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
def test_cuda_left_out(nvcc, torch_cuda, why, tmp_path):
    assert lines_of(cuda_setup(tmp_path, nvcc, torch_cuda)) == [f"building without CUDA ({why})"]


@needs_setup
@pytest.mark.parametrize(("version", "fits"), [("2.10.1+cpu", False), ("2.11.0a0+git1234", True), ("3.0.0", True)])
def test_headers_of_an_older_torch(version, fits, tmp_path):
    (line,) = lines_of(cuda_setup(tmp_path, version=version, LIT_DID_CUDA="0"))
    assert ("these are missing: torch>=2.11." in line) is not fits


@needs_setup
def test_nvcc_that_calls_another(tmp_path):
    """A script on PATH that stands for nvcc: the toolkit is where the real one says, not beside the script."""
    (tmp_path / "toolkit/bin").mkdir(parents=True)
    script(tmp_path / "toolkit/bin/nvcc", NVCC.format(home=tmp_path / "toolkit", version="13.0", architectures="sm_90"))
    (tmp_path / "path").mkdir()
    script(tmp_path / "path/nvcc", f'#!/bin/sh\nexec {tmp_path}/toolkit/bin/nvcc "$@"\n')
    assert runpy.run_path(str(ROOT / "setup.py"))["Toolkit"](str(tmp_path / "path/nvcc")).home == tmp_path / "toolkit"


@needs_setup
def test_commands_on_macos(monkeypatch, tmp_path):
    """The library finds torch's symbols in torch's own library, and threads there too: nothing asks for OpenMP."""
    script(tmp_path / "clang++", "#!/bin/sh\necho arm64-apple-darwin23.6.0\n")
    (tmp_path / "version.py").write_text("__version__, cuda = '2.13.0', None\n")
    monkeypatch.chdir(ROOT)
    for name in ("CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    setup, compiler = runpy.run_path("setup.py"), [str(tmp_path / "clang++")]
    monkeypatch.setitem(setup["Build"].link.__globals__, "ON_MACOS", True)
    build = setup["Build"](setup["Torch"](tmp_path), compiler, None)
    (module, of_module), (library, of_library) = build.libraries
    assert [path for path in of_library if "rows_" in path] == ["csrc/cpu/rows_baseline.cpp"]
    assert build.link(module, tmp_path) == ([*compiler, "-shared"], ["-Wl,-undefined,dynamic_lookup"])
    assert build.link(library, tmp_path) == ([*compiler, "-shared"], [f"-L{tmp_path}/lib", "-ltorch_cpu"])
    for source in {*of_module, *of_library}:
        assert not [word for word in build.compile(source) if "openmp" in word or word.startswith("-m")]
