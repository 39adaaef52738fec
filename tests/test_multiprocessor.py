"""The model of a multiprocessor where one thing alone limits it, and what docs/kernels.md says of the kernels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tools import multiprocessor
from tools.multiprocessor import DRAM, EXP2_CLOCKS, GPU, ISSUED, NOW, PIPE, SCHEDULERS, Kernel, bytes_per_clock, rows

ROOT = Path(__file__).parents[1]
FAST = GPU("no latency", "sm_90", 1e9, 1e9, 1, 1, 1e-3)
BARE = Kernel(
    blocks=16, warps=1, turns=400, load=1000, exp2=1, float32=0, turn=200, alone=400,
    prologue=0, part=0, part_turns=400, move=0, moves=0, end=0, finish=0, ahead=0.5,
)  # fmt: skip


def close(value, expected):
    return value == pytest.approx(expected, rel=0.03)


def test_instructions_alone():
    assert close(bytes_per_clock(BARE, FAST, 16), SCHEDULERS * ISSUED * 1000 / 200)


def test_exponentials_alone():
    kernel = replace(BARE, exp2=60)
    assert close(bytes_per_clock(kernel, FAST, 16), SCHEDULERS * PIPE * 1000 / (60 * EXP2_CLOCKS))


def test_float32_at_half_rate():
    kernel, gpu = replace(BARE, float32=150), replace(FAST, float32_lanes=64)
    assert close(bytes_per_clock(kernel, gpu, 16), SCHEDULERS * PIPE * 1000 / (2 * 150))


def test_bandwidth_alone():
    gpu = replace(FAST, peak=10, latency=400)
    assert close(bytes_per_clock(BARE, gpu, 16), 10 * DRAM)


@pytest.mark.parametrize(("ahead", "clocks"), [(0, 5000 + 400 + 50), (0.5, 5000 + 200)])
def test_latency_alone(ahead, clocks):
    """A single warp waits for every turn's loads, less what it computes after they went out."""
    kernel, gpu = replace(BARE, blocks=1, turns=400, ahead=ahead), replace(FAST, latency=5000)
    assert close(bytes_per_clock(kernel, gpu, 4), 1000 / clocks)


def test_what_a_block_costs():
    kernel = replace(BARE, warps=4, blocks=4, turns=8, part_turns=4, prologue=100, part=50, end=30)
    instructions = 8 * 200 + 100 + 2 * 50 + 30
    free = multiprocessor.LAST_STORE + multiprocessor.BLOCK_START
    between = bytes_per_clock(kernel, FAST, 400)
    most = SCHEDULERS * ISSUED * 8 * 1000 / instructions
    assert most * (1 - 2 * free / (instructions * 4)) < between < most


def test_docs():
    """The table of docs/kernels.md, and the goal: nine tenths of a copy's bandwidth on H100 and H200."""
    text = (ROOT / "docs/kernels.md").read_text()
    expected = {name: shares for name, *shares in rows()}
    for name, shares in expected.items():
        (line,) = re.findall(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE)
        assert re.findall(r"\d+%", line) == [*shares, "90%"], name
    assert all(int(expected[name][1].rstrip("%")) >= 90 for name in ("H100", "H200"))
    assert {kernel.turn for kernel in NOW.values()} == {293, 332}
