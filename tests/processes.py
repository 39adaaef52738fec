"""Runs programs for tests: a command whose output is not lost, and the ranks of a process group (gloo, CPU)."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]


def run_program(
    *command: object, environment: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 600
) -> str:
    """The standard output of a command, with one thread. If it fails, so does the test, with everything it printed.

    Args:
        command: The program and its arguments.
        environment: The whole environment. None means this process's.
        cwd: The folder that the command runs in.
        timeout: Seconds after which the command is killed.
    """
    arguments = [str(argument) for argument in command]
    inherited = os.environ if environment is None else environment
    try:
        result = subprocess.run(
            arguments,
            cwd=cwd,
            env={"OMP_NUM_THREADS": "1", **inherited},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(
            f"{' '.join(arguments)} did not end within {timeout} s.\n{_text(error.stdout)}{_text(error.stderr)}"
        )
    if result.returncode:
        code = result.returncode if result.returncode > 0 else signal.Signals(-result.returncode).name
        pytest.fail(f"{' '.join(arguments)} ended with {code}.\n{result.stdout}{result.stderr}")
    return result.stdout


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def run_ranks(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(*arguments)` on every rank of a new process group. Call it from a program of its own.

    The ranks are forked, so that none imports anything again, and a process whose OpenMP threads have worked may not
    fork. They meet in a file: two runs at once cannot take each other's port. Lightning, accelerate and transformers
    find the group and their rank as under torchrun. All ranks end together, because gloo's threads may abort a process
    whose peers are gone. The error of one rank is raised here, with its traceback, after the others have been killed.
    A single process forms no group.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _work_as_rank, (processes, f"{folder}/store", work, arguments), nprocs=processes, start_method="fork"
        )


def _work_as_rank(rank: int, processes: int, store: str, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    if processes == 1:
        work(*arguments)
        return
    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in of_rank.items()})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    work(*arguments)
    dist.barrier()
    dist.destroy_process_group()
