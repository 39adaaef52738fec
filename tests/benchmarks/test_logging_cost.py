"""The logging cost's benchmark runs, and counts what it says."""

from __future__ import annotations

import sys

import pytest

from tests.processes import run_program


@pytest.mark.long
def test_on_a_tiny_model(tiny_model):
    sizes = ("--model", tiny_model, "--steps", 3, "--max-length", 64)
    printed = run_program(sys.executable, "-m", "benchmarks.logging_cost", *sizes)
    for kind in ("lora", "full"):
        assert f"{kind}, 4 pairs a step" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    times = {}
    for name, milliseconds, *_ in rows[: len(rows) // 2]:
        times[name] = float(milliseconds)
    parts = ("operator, forward", "metrics: update", "metrics: compute and log")
    assert times.keys() >= {"a step", *parts, "all of LitDPO's logging", "DIDMonitor, a step that it measures"}
    assert 0 < times["all of LitDPO's logging"] < times["a step"]
    # The median of sums, against the sum of medians of three steps: shown to a tenth of a millisecond.
    assert times["all of LitDPO's logging"] > 0.5 * sum(times[part] for part in parts)
