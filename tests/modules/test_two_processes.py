"""Two processes (DDP or FSDP 2; gloo, CPU) train to the weights and metrics of one with the same pairs a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["full", "lora", "projected", "sharded", "sharded lora"])
def test_two_processes_equal_one(tmp_path, kind):
    results = {}
    for processes in (1, 2):
        path = tmp_path / str(processes)
        command = [sys.executable, "-m", "tests.modules.two_processes", str(processes), kind, str(path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
        results[processes] = [torch.load(f"{path}.{rank}") for rank in range(processes)]
    one = results[1][0]
    assert len(one["steps"]) == 4
    assert kind != "projected" or all(step["train/gradient_cosine"] > 0 for step in one["steps"])  # the premise
    assert [rank["sharded"] > 0 for rank in results[2]] == ["sharded" in kind] * 2  # the premise
    for rank in results[2]:  # both ranks hold the same truth, not their own share of it
        for name, weight in one["weights"].items():
            # float32 sums in another order, through four steps of Adam
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=1e-4)
        for mine, expected in zip([*rank["steps"], rank["val"]], [*one["steps"], one["val"]], strict=True):
            assert mine.keys() == expected.keys()
            assert len(expected) >= 14 + 13  # LitDPO's own and the monitor's
            for name, value in expected.items():
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
