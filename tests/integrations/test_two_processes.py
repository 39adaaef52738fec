"""DIDCallback under two processes logs what it logs under one, on both ranks."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.processes import run_program


def values(history: list[dict]) -> dict[str, float]:
    """{step name: value} of all that the callback logged."""
    return {f"{entry['step']} {name}": value for entry in history for name, value in entry.items() if "did/" in name}


def test_two_processes_equal_one(tmp_path):
    run_program(sys.executable, "-m", "tests.integrations.two_processes", tmp_path)
    expected = values(torch.load(tmp_path / "history.1.0"))
    assert len(expected) == 14 * (3 + 1)
    for rank in range(2):
        # float32 sums in another order, through three steps
        assert values(torch.load(tmp_path / f"history.2.{rank}")) == pytest.approx(expected, rel=1e-3, abs=1e-4)
