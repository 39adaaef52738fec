"""The CPU library for arm64, with the commands of setup.py and a compiler for another processor. It is not run."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess

import pytest

from tests.processes import ROOT
from tests.test_stable_abi import stable_symbols, undefined

ARM64 = 183  # EM_AARCH64


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs `nm`")
def test_library(zig, monkeypatch, tmp_path):
    compiler = [*zig, "c++", "-target", "aarch64-linux-gnu.2.28"]
    monkeypatch.setenv("CXX", shlex.join(compiler))
    monkeypatch.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    build = setup["Build"](setup["find_torch"](), compiler, None)
    assert list(build.levels) == ["baseline"]
    name, library = "lit_did.lib.lit_did_cpu", tmp_path / "lit_did_cpu.so"
    build.libraries = [(each, sources) for each, sources in build.libraries if each == name]
    build.run(tmp_path / "build", {name: str(library)})

    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == ARM64
    of_c, of_torch = undefined(library)
    assert "aoti_torch_get_sizes" in of_torch
    assert set(of_torch) - stable_symbols() == set()
    versions = [tuple(map(int, version)) for version in re.findall(r"@GLIBC_(\d+)\.(\d+)", " ".join(of_c))]
    assert (2, 17) <= max(versions) <= (2, 28)
    needed = subprocess.check_output(["objdump", "-p", library], text=True)
    assert re.findall(r"NEEDED +(libtorch\S*)", needed) == ["libtorch_cpu.so"]
