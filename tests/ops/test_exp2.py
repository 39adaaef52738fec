"""The row kernels' exp2 against float64's, over every exponent that it is used on, at every instruction-set level."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++").split()
# The level's flags as the build has them, and the bounds that simd.h states: the relative error, and below 2^-126,
# where only AVX-512 goes on, the error in units of 2^-126.
FLAGS = ast.literal_eval(re.search(r"LEVELS = (\{.*?\n\})", (ROOT / "setup.py").read_text(), re.S)[1])
BOUNDS = {"baseline": (1.95e-7, 1), "avx2": (1.72e-7, 1), "avx512": (1.78e-7, 1.8e-7)}


def runs_here(level: str) -> bool:
    if level == "baseline":
        return True
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() and platform.machine() in ("x86_64", "AMD64") else []
    return all(flag.removeprefix("-m") in words for flag in FLAGS[level])


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler: {COMPILER[0]}")
@pytest.mark.parametrize("level", BOUNDS)
def test_error(level, tmp_path):
    if not runs_here(level):
        pytest.skip(f"this processor is not known to have {level}")
    program = tmp_path / "exp2_error"
    source = Path(__file__).parent / "exp2_error.cpp"
    subprocess.check_call(
        [*COMPILER, "-O3", "-std=c++17", "-Wno-psabi", *FLAGS[level], str(source), "-o", str(program)]
    )
    normal, subnormal, special = map(float, subprocess.check_output(program, text=True).split())
    assert 1e-8 < normal <= BOUNDS[level][0]  # a sweep that finds nothing has swept nothing
    assert 1e-8 < subnormal <= BOUNDS[level][1]
    assert special == 0
