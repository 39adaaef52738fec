"""The read limit of the CPU: how fast all threads together can read a tensor (read.cpp, compiled on first use).

The system's compiler links its OpenMP library by the name of the one that torch has loaded, so that on Linux both use
the same threads and neither waits for the other's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

SOURCE = Path(__file__).with_name("read.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


@cache
def load() -> Callable[[Tensor, int], int]:
    """A function of (tensor, threads) that reads all of a contiguous tensor and returns the sum of its 64-bit words.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails. The message says what to do.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("the read limit needs a C++ compiler: install g++ or clang++, or name one in CXX")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"the read limit's compiler {compiler!r} does not start: {error.strerror}") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"the read limit does not compile: {' '.join(command)}\n{error.stderr}") from error
        read_words = ctypes.CDLL(str(library)).read_words
    read_words.restype = ctypes.c_uint64
    read_words.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)

    def read(tensor: Tensor, threads: int) -> int:
        # Up to seven bytes at the end are not read, which does not matter at sizes that are worth timing.
        return read_words(tensor.data_ptr(), tensor.nbytes // 8, threads)

    return read
