"""The doctor's report says what is true of this install."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from lit_did import doctor
from lit_did.ops.extension import EXTENSION, fused_devices
from tests.processes import run_program


def test_report():
    result = subprocess.run([sys.executable, "-m", "lit_did.doctor"], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == (0 if "cpu" in fused_devices() else 1)
    lines = {line[:13].strip(): line[13:].strip() for line in result.stdout.splitlines() if line}
    assert lines["torch"] == torch.__version__
    assert lines["trl"] == "not installed" or lines["trl"][0].isdigit()
    expected = "fused operators" if "cpu" in fused_devices() else "plain PyTorch"
    assert expected in lines["cpu tensors"]
    if torch.version.cuda is None:
        assert lines["cuda tensors"] == "not possible: this torch is a build without CUDA"
    elif not torch.cuda.is_available():
        expected = "fused operators" if "cuda" in fused_devices() else "plain PyTorch"
        assert expected in lines["cuda tensors"]
        assert lines["cuda tensors"].endswith("but no CUDA device is found")
    if EXTENSION.module is None:
        assert EXTENSION.problem in lines["extension"]
    else:
        built = EXTENSION.module
        assert lines["extension"] == f"for torch {built.oldest_torch} and newer"
        assert lines["CPU"].endswith(f"; this processor uses {built.simd_level()}")
        if EXTENSION.cuda is None:
            assert lines["CUDA"] == f"none: {EXTENSION.cuda_problem}"
        else:
            cuda_version, *architectures = EXTENSION.cuda.split()
            assert lines["CUDA"] == f"{cuda_version}, architectures {', '.join(architectures)}"


def test_an_unknown_simd_level_is_reported():
    environment = {**os.environ, "LIT_DID_SIMD": "mmx"}
    printed = run_program(sys.executable, "-m", "lit_did.doctor", environment=environment)
    assert EXTENSION.module is None or "LIT_DID_SIMD to be one of baseline" in printed


def test_quiet_leaves_the_exit_status(capsys, monkeypatch):
    monkeypatch.setattr("lit_did.ops.extension.fused_devices", lambda: {"cpu": None})
    assert doctor.main(["--quiet"]) == 0
    monkeypatch.setattr("lit_did.ops.extension.fused_devices", dict)
    assert doctor.main(["--quiet"]) == 1
    assert capsys.readouterr().out == ""
