"""The tests of the CUDA kernels can fail: copies of csrc with one mistake each, and what reports it."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.cuda.comparing import moved, random_case, run_and_check
from tests.cuda.emulator import CSRC, EmulationError
from tests.cuda.test_sanitizers import sequence_cases


def aligned():
    return [random_case(2, 1000, upstream=None)]


def with_gradients():
    return [random_case(2, 1000)]


def misaligned():
    return [moved(random_case(2, 1000), 1, 3, gap=16)]


def odd():
    """The last row ends with the memory, in the middle of a chunk."""
    return [random_case(1, 33, upstream=None)]


def ignored():
    case = random_case(3, 100, upstream=None)
    case.labels[0] = -100
    return [case]


# name: file, what stands there, what the copy has instead, the cases, the build, and what it must say.
BREAKAGES = {
    "no barrier before the warps' sums are read": (
        *("forward.cuh", "  __syncthreads();\n", ""),
        *(aligned, "plain", "worse than naive"),
    ),
    "the same, seen by ThreadSanitizer": (
        *("forward.cuh", "  __syncthreads();\n", ""),
        *(aligned, "thread", "data race"),
    ),
    "no barrier before the coefficients are read": (
        *("backward.cuh", "  __syncthreads();\n", ""),
        *(with_gradients, "plain", "worse than naive"),
    ),
    "no barrier in the sequences' sums": (
        *("sequences.cuh", "  __syncthreads();\n", ""),
        *(sequence_cases, "thread", "data race"),
    ),
    "warps that leave before the barrier": (
        *("forward.cuh", "  __syncthreads();\n  if (warp != 0) return {};\n"),
        "  if (warp != 0) return {};\n  __syncthreads();\n",
        *(aligned, "plain", "divergence: a barrier that not every thread reaches"),
    ),
    "a sum over half the lanes": (
        *("device.cuh", "int step = kWarp / 2; step > 0; step /= 2) value +="),
        "int step = kWarp / 4; step > 0; step /= 2) value +=",
        *(aligned, "plain", "worse than naive"),
    ),
    "one entry too many in the tail": (
        *("entries.cuh", "index < size ?", "index <= size ?"),
        *(odd, "address", "heap-buffer-overflow"),
    ),
    "one entry too many written": (
        *("entries.cuh", "begin + i < size)", "begin + i <= size)"),
        *(misaligned, "plain", "written between the rows|written outside a buffer"),
    ),
    "words around a chunk taken to be inside the row": (
        *("entries.cuh", "begin + kEntries + kAround <= size", "begin + kEntries <= size"),
        *(misaligned, "address", "use-after-poison|heap-buffer-overflow"),
    ),
    "16 bytes stored wherever a chunk lies": (
        *("entries.cuh", " || bytes_past_boundary(to) != 0", ""),
        *(misaligned, "address", "store to misaligned address"),
    ),
    "ignored rows read": (
        *("forward.cuh", "  if (a.problem.labels[row] == a.problem.ignore_index) return;\n", ""),
        *(ignored, "address", "use-after-poison"),
    ),
}


# One for each of the plain build's checks; each copy is compiled, which takes seconds.
OFTEN = ("a sum over half the lanes", "one entry too many written", "warps that leave before the barrier")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in BREAKAGES]
)
def test_caught(name, build, tmp_path):
    header, right, wrong, cases, sanitizer, report = BREAKAGES[name]
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    replace(copy / "cuda" / header, right, wrong)
    # One dtype is enough, and compiles faster.
    replace(copy / "cuda" / "entries.cuh", OTHER_DTYPES, "    default:\n      return function(float{});\n")
    emulator = build(sanitizer, copy)
    with pytest.raises((EmulationError, AssertionError)) as error:
        run_and_check(emulator, cases())
    assert re.search(report, str(error.value)), error.value


OTHER_DTYPES = """\
    case ScalarKind::kFloat:
      return function(float{});
    case ScalarKind::kBFloat16:
      return function(BFloat16{});
    case ScalarKind::kFloat16:
      return function(Float16{});
    default:
      return function(double{});
"""


def replace(path, right, wrong):
    text = path.read_text()
    assert text.count(right) == 1, f"{path.name} has changed: {right!r} occurs {text.count(right)} times"
    path.write_text(text.replace(right, wrong))
