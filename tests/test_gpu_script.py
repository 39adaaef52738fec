"""`tools/gpu.sh` on the CPU: every step runs, a step that fails does not stop the others, and time limits hold."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools/gpu.sh"
STEPS = ["build", "speed", "linear", "llama", "tests"]

pytestmark = pytest.mark.skipif(
    not SCRIPT.is_file() or shutil.which("timeout") is None, reason="needs a clone and the command `timeout`"
)


def run(folder: Path, python: str, *arguments: str, **environment: str) -> tuple[int, dict[str, int], str]:
    """The exit status, every step's, and what was printed."""
    environment = {"PYTHON": python, "OUT": str(folder / "out"), "OMP_NUM_THREADS": "1", "LIMIT": "9999"} | environment
    result = subprocess.run([SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True)
    summary = (folder / "out/summary.txt").read_text()
    steps = {name: int(code) for name, code in re.findall(r"^(\w+) +exit +(\d+) ", summary, re.MULTILINE)}
    return result.returncode, steps, result.stdout + result.stderr


def stand_in(folder: Path, fails: str) -> str:
    """An interpreter that does nothing, and fails where `fails` is among its arguments."""
    return command(folder / "python", f'case "$*" in *{fails}*) exit 3 ;; *capability*) echo 9.0 ;; esac')


def command(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.long
def test_dry_run(tmp_path):
    code, steps, said = run(tmp_path, sys.executable, "--dry-run")
    assert steps == dict.fromkeys(STEPS, 0), said
    assert code == 0
    with (tmp_path / "out/speed/bandwidth.csv").open() as file:
        directions = {(line["contestant"], line["direction"]) for line in csv.DictReader(file)}
    backwards = ("both gradients", "policy's gradient", "log-probability's gradient")
    assert directions == {("limit", "limit"), ("statistics", "forward")} | {(name, "backward") for name in backwards}
    with (tmp_path / "out/linear.csv").open() as file:
        assert [line["contestant"] for line in csv.DictReader(file)] == ["lit_did", "liger's way"]
    runs = json.loads((tmp_path / "out/llama_step.json").read_text())
    first = [run["losses"][0] for run in runs.values()]
    assert len(first) == 4
    assert first == pytest.approx([first[0]] * 4, rel=1e-2)


def test_a_step_that_fails_stops_no_other(tmp_path):
    code, steps, _ = run(tmp_path, stand_in(tmp_path, "benchmarks.bandwidth"), "--dry-run", "--beside", str(ROOT))
    again = {"beside": 3, "speed": 3, "speed_again": 3, "beside_again": 3}
    assert steps == dict.fromkeys(STEPS, 0) | again
    assert code == 1


def test_the_steps_on_a_gpu(tmp_path):
    """Their commands stand in for themselves."""
    command(tmp_path / "compute-sanitizer", "case $2 in racecheck) exit 9 ;; esac")
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, steps, _ = run(tmp_path, stand_in(tmp_path, "nothing"), PATH=path)
    sanitizers = {"streams": 0, "memcheck": 0, "racecheck": 9}
    assert (code, steps) == (1, dict.fromkeys(STEPS, 0) | sanitizers)


def test_without_a_build_nothing_is_measured(tmp_path):
    code, steps, _ = run(tmp_path, stand_in(tmp_path, "lit_did.doctor"), "--dry-run")
    assert (code, steps) == (1, {"build": 3})


def test_the_time_limit(tmp_path):
    code, steps, said = run(tmp_path, stand_in(tmp_path, "nothing"), "--dry-run", LIMIT="4")
    assert (code, steps) == (1, {"build": 124})
    assert "no time left" in said


def test_no_gpu(tmp_path):
    python = stand_in(tmp_path, "get_device_capability")
    code, steps, said = run(tmp_path, python)
    assert (code, steps) == (2, {})
    assert "finds no CUDA device" in said
    assert "make cuda-build" in said


def test_without_torch(tmp_path):
    code, steps, said = run(tmp_path, stand_in(tmp_path, "torch"), "--dry-run")
    assert (code, steps) == (2, {})
    assert re.fullmatch(r"tools/gpu.sh: \S+ has no torch. Pass PYTHON=.*\n", said)


def test_what_is_skipped_is_said(tmp_path):
    python = command(tmp_path / "python", 'case "$*" in *transformers*) echo transformers ;; esac')
    code, steps, said = run(tmp_path, python, "--dry-run")
    assert (code, steps) == (0, dict.fromkeys([step for step in STEPS if step != "llama"], 0))
    skipped = re.findall(r"^(\S+) +skipped: transformers is not installed$", said, re.MULTILINE)
    assert set(skipped) == {"llama", "tests/models"}


def test_a_bad_argument_gets_the_usage(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.txt").touch()
    code, _, said = run(tmp_path, sys.executable, "--fast")
    assert code == 2
    assert "tools/gpu.sh [--dry-run] [--beside CLONE]" in said
