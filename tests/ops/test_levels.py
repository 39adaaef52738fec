"""Every instruction-set level: the tests of values, support and determinism again, for those that are not in use here.

The level is read once a process, so each runs in a process of its own, as does a wrong LIT_DID_SIMD.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lit_did.ops.extension import EXTENSION
from tests.helpers import simd_level

FOLDER = Path(__file__).parent
LEVELS = ("baseline", "avx2", "avx512")
PROBE = "import lit_did; print(lit_did.ops.extension.EXTENSION.module.simd_level())"


def run(*command, level):
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"LIT_DID_SIMD": level},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if level not in EXTENSION.module.simd_levels:
        pytest.skip(f"this build for {platform.machine()} has {', '.join(EXTENSION.module.simd_levels)}, not {level}")
    if level == simd_level():
        pytest.skip(f"{level} is in use: the tests beside this one ran on it")
    probe = run("-c", PROBE, level=level)
    if "to be one of" in probe.stderr:
        pytest.skip(f"this processor lacks {level}")
    assert probe.stdout.strip() == level, probe.stderr
    files = [FOLDER / f"test_{name}.py" for name in ("token_statistics", "support", "determinism")]
    # The reference does not know levels. Rows of whole vocabularies and of 530 entries run the same code.
    tests = run("-m", "pytest", "-q", "-x", *files, "-k", "not reference] and not language_models", level=level)
    assert tests.returncode == 0, tests.stdout


@pytest.mark.parametrize("level", ["avx1024", "AVX2", " "])
def test_unknown_level(level):
    probe = run("-c", PROBE, level=level)
    assert probe.returncode != 0
    wanted = "ValueError: Expected the environment variable LIT_DID_SIMD to be one of baseline"
    assert wanted in probe.stderr
    assert f"but got {level}." in probe.stderr


def test_unknown_level_in_an_operator():
    """It is the first call that finds out; it raises, and so does every later one."""
    probe = run(
        "-c",
        "import torch, lit_did\n"
        "for _ in range(2):\n"
        "    try: lit_did.token_statistics(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))\n"
        "    except Exception as error: print(type(error).__name__, str(error).splitlines()[0])",
        level="avx1024",
    )
    lines = probe.stdout.splitlines()
    assert len(lines) == 2
    assert all("Expected the environment variable LIT_DID_SIMD to be one of" in line for line in lines), lines
