"""The peak memory of one call beyond what the process held before it: measured, not added up."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MEASURED_ON_CPU = sys.platform == "linux"


def peak(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """The peak bytes of `call()` beyond those before it, and what it returned.

    On the CPU these are all resident pages of the process, to within about 100 KiB that the kernel counts late. They
    are NaN if the system is not Linux. On CUDA they are what torch's allocator allocated.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, returned
    before = reset_peak()
    returned = call()
    return highest() - before, returned


def reset_peak() -> float:
    """Resets the process's peak to what is resident now, and returns that in bytes. NaN if the system is not Linux."""
    if not MEASURED_ON_CPU:
        return math.nan
    # Freed memory that the C library keeps would be used again without being measured.
    gc.collect()
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def highest() -> float:
    """The most resident bytes of this process since `reset_peak()`. NaN if the system is not Linux."""
    return _status("VmHWM") if MEASURED_ON_CPU else math.nan


def held(tensors: Iterable[Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors' memory, each piece counted once, without the memory of `apart_from`."""
    counted = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def free(device: torch.device) -> None:
    """Gives unused memory back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif MEASURED_ON_CPU:
        _trim()


def available(device: torch.device) -> float:
    """Bytes that can still be allocated; infinite if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes("/proc/meminfo", "MemAvailable") if MEASURED_ON_CPU else math.inf


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    return _kibibytes("/proc/self/status", name)


def _kibibytes(path: str, name: str) -> int:
    """Bytes in the line `name:  123 kB` of a file."""
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
