"""Processes with sharded models run equally many forward passes, however many sequences each of them measures."""

from __future__ import annotations

import sys

from tests.processes import run_program


def test_different_numbers_of_pairs_are_measured_with_sharded_models():
    run_program(sys.executable, "-m", "tests.models.two_processes", timeout=120)
