"""A compiler for arm64 and an emulator of its processors."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cuda.emulator import Emulator
from tests.processes import ROOT, run_program

ZIG = [sys.executable, "-m", "ziglang"]
QEMU = next(filter(None, map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))), None)
# musl's C library is linked statically, so that a program runs without arm64's libraries. Whatever needs no more than C
# is linked in seconds, because C++'s library need not be compiled first.
TARGET = ["-target", "aarch64-linux-musl"]


@pytest.fixture(scope="session")
def zig() -> list[str]:
    """The command that compiles for any processor."""
    if find_spec("ziglang") is None:
        pytest.skip("there is no compiler for arm64: pip install -c constraints.txt ziglang")
    return ZIG


class RowKernels(Emulator):
    """The row kernels of csrc/cpu, which `run` gives cases as it gives them to the CUDA kernels."""

    def __init__(self, qemu: str, driver: Path):
        self.prefix, self.driver = [qemu], driver


@pytest.fixture(scope="session")
def build(zig, tmp_path_factory) -> Callable[..., Path]:
    """build(sources) -> a program for arm64, with the flags that setup.py has for the row kernels."""
    if QEMU is None:
        pytest.skip("there is no emulator of arm64: apt-get install qemu-user-static")
    folder = tmp_path_factory.mktemp("arm64")

    def built(*sources: str) -> Path:
        flags = [*TARGET, "-O3", "-std=c++17", "-fno-exceptions", "-fno-threadsafe-statics", "-Wno-psabi"]
        objects = [folder / f"{Path(source).stem}.o" for source in sources]
        for source, path in zip(sources, objects, strict=True):
            run_program(*zig, "c++", *flags, "-c", ROOT / source, "-o", path)
        program = folder / Path(sources[0]).stem
        run_program(*zig, "cc", *TARGET, "-static", *objects, "-o", program)
        return program

    return built


@pytest.fixture(scope="session")
def row_kernels(build) -> RowKernels:
    return RowKernels(QEMU, build("tests/arm64/driver.cpp", "csrc/cpu/rows_baseline.cpp"))
