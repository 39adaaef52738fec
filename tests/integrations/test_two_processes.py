"""DIDCallback under two processes logs what it logs under one, on both ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(folder: Path, processes: int) -> list[list[dict]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.integrations.two_processes", str(folder)]
    started = []
    for rank in range(processes):
        of_rank = {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environment = os.environ | {name: str(value) for name, value in (of_rank | address).items()}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"history.{processes}.{rank}") for rank in range(processes)]


def values(history: list[dict]) -> dict[str, float]:
    """{step name: value} of all that the callback logged."""
    return {f"{entry['step']} {name}": value for entry in history for name, value in entry.items() if "did/" in name}


def test_two_processes_equal_one(tmp_path):
    (one,) = run(tmp_path, 1)
    expected = values(one)
    assert len(expected) == 13 * (3 + 1)
    for history in run(tmp_path, 2):
        # float32 sums in another order, through three steps
        assert values(history) == pytest.approx(expected, rel=1e-3, abs=1e-4)
