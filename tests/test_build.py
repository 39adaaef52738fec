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
def test_cuda_demanded_but_missing():
    message = last_line(setup_py(LIT_DID_CUDA="1"))
    assert message.startswith("LIT_DID_CUDA=1 demands the CUDA kernels, which need nvcc and a CUDA build of torch")
    assert f"torch {torch.__version__}: a build without CUDA" in message
    assert "nvcc: found" in message or "nvcc: missing (set CUDA_HOME)" in message


@needs_setup
@pytest.mark.parametrize("switch", ["LIT_DID_CUDA", "LIT_DID_EXTENSION"])
def test_bad_switch(switch):
    message = last_line(setup_py(**{switch: "banana"}))
    assert message == f"Expected the environment variable {switch} to be 0 or 1, but got 'banana'."


@needs_setup
@pytest.mark.parametrize("missing", ["torch", "pybind11"])
def test_build_without_what_it_needs(missing):
    message = last_line(setup_py(blocked=missing))
    assert message.startswith("lit-did's extension is built against the torch and pybind11 that are installed")
    assert missing in message.split("(")[1]
    assert "`pip install torch setuptools pybind11 ninja`, then `pip install --no-build-isolation .`" in message


@needs_setup
def test_pure_python_needs_no_torch():
    result = setup_py(blocked="torch", LIT_DID_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "lit-did"
