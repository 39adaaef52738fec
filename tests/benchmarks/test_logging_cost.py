"""The logging cost's benchmark runs, and counts what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_on_a_tiny_model(tiny_model):
    command = [sys.executable, "-m", "benchmarks.logging_cost", "--model", str(tiny_model), "--steps", "3"]
    result = subprocess.run([*command, "--max-length", "64"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for kind in ("lora", "full"):
        assert f"{kind}, 4 pairs a step" in result.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    times = {}
    for name, milliseconds, *_ in rows[: len(rows) // 2]:
        times[name] = float(milliseconds)
    parts = ("operator, forward", "metrics: update", "metrics: compute and log")
    assert times.keys() >= {"a step", *parts, "all of LitDPO's logging", "DIDMonitor, a step that it measures"}
    assert 0 < times["all of LitDPO's logging"] < times["a step"]
    # The median of sums, against the sum of medians of three steps: shown to a tenth of a millisecond.
    assert times["all of LitDPO's logging"] > 0.5 * sum(times[part] for part in parts)
