"""DIDCallback under two processes logs what it logs under one, on both ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.processes import run_program


def histories(folder: Path, processes: int) -> list[list[dict]]:
    """What the trainer of every rank logged."""
    run_program(sys.executable, "-m", "tests.integrations.two_processes", processes, folder)
    return [torch.load(folder / f"history.{processes}.{rank}") for rank in range(processes)]


def values(history: list[dict]) -> dict[str, float]:
    """{step name: value} of all that the callback logged."""
    return {f"{entry['step']} {name}": value for entry in history for name, value in entry.items() if "did/" in name}


def test_two_processes_equal_one(tmp_path):
    (one,) = histories(tmp_path, 1)
    expected = values(one)
    assert len(expected) == 14 * (3 + 1)
    for history in histories(tmp_path, 2):
        # float32 sums in another order, through three steps
        assert values(history) == pytest.approx(expected, rel=1e-3, abs=1e-4)
