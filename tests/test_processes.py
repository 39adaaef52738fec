"""The test of a program that fails shows what the program printed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import run_program


def test_a_program_that_aborts():
    code = "import os, sys; print('to stdout', flush=True); print('to stderr', file=sys.stderr, flush=True); os.abort()"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with SIGABRT.*to stdout.*to stderr"):
        run_program(sys.executable, "-c", code)


def test_a_program_that_hangs(monkeypatch):
    def run(arguments, **_):
        raise subprocess.TimeoutExpired(arguments, 600, output=b"to stdout\n", stderr=b"to stderr\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)did not end within 600 s.*to stdout.*to stderr"):
        run_program(sys.executable)
