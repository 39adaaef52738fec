"""The tests of the CUDA kernels can fail: copies of csrc with one mistake each, and what reports it."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from tests.cuda.comparing import PART, among_many, moved, random_case, run_and_check
from tests.cuda.emulator import CSRC, EmulationError, TokenCase
from tests.cuda.test_sanitizers import sequence_cases
from tests.cuda.test_support import assert_as_specified, rows_of


def aligned():
    return [random_case(2, 1000, upstream=None)]


def rising():
    case = random_case(2, 4099, upstream=None)
    case.policy += 0.3 * torch.arange(4099)
    return [case]


def many():
    """Blocks that finish their row."""
    return [among_many(random_case(1, 1000))]


def long():
    """A part for more than half the lanes of a warp."""
    return [random_case(1, 17 * PART, upstream=None)]


def masked():
    """Entries that count as infinite, after the first turn."""
    values = [(-1e9, -1e9), (-1e9, None), (None, -1e9), (2e6, None)]
    policy, reference, labels, _ = rows_of(1100, [600], values, ("f32", "f32"))
    return [TokenCase(policy, reference, labels, upstream=[torch.zeros(len(labels))] * 9)]


def in_pairs():
    return [random_case(2, 1000, ("bf16", "bf16"), upstream=None)]


def above():
    """Differences in the second turn for which polynomials have no exponent."""
    case = random_case(16, 1024, ("bf16", "bf16"), upstream=None)
    rows = torch.arange(16)
    far = (-1000 - 37 * rows).to(case.reference)
    case.reference[rows, 512 + rows % 8 + 256 * (rows // 8)] = far
    return [case]


def below():
    case = random_case(2, 1024, ("bf16", "bf16"), upstream=None)
    case.policy[:, 3] = 110
    return [case]


def with_gradients():
    return [random_case(2, 1000)]


def two_turns():
    """Of the log-probabilities' backward; the second is short."""
    case = random_case(1, 4200)
    case.upstream[2:] = [None] * 7
    return [case]


def softcapped():
    case = random_case(2, 1000, softcaps=(3.0, None))
    case.policy = 3 * torch.tanh(case.policy / 3)
    case.upstream[2:] = [None] * 7
    return [case]


def misaligned():
    return [moved(random_case(2, 1000), 1, 3, gap=16)]


def whole_turns():
    """The words around the last turn's last chunk lie beyond the row."""
    return [moved(random_case(2, 1024, upstream=None), 1, 3, gap=16)]


def odd():
    """The last row ends with the memory, in the middle of a chunk."""
    return [random_case(1, 33, upstream=None)]


def ignored():
    case = random_case(3, 100, upstream=None)
    case.labels[0] = -100
    return [case]


# name: file, what stands there, what the copy has instead, the cases, the build, and what it must say.
BREAKAGES = {
    "no barrier before the parts' sums are read": (
        *("forward.cuh", "  __syncwarp();\n", ""),
        *(many, "plain", "worse than naive"),
    ),
    "the same, seen by ThreadSanitizer": (
        *("forward.cuh", "  __syncwarp();\n", ""),
        *(many, "thread", "data race"),
    ),
    "no barrier before the coefficients are read": (
        *("backward.cuh", "  __syncthreads();\n  return shared;", "  return shared;"),
        *(with_gradients, "plain", "worse than naive"),
    ),
    "no barrier before the coefficients are worked out": (
        *("backward.cuh", "  __syncthreads();\n  if (i % kWarp == 0", "  if (i % kWarp == 0"),
        *(with_gradients, "plain", "worse than naive"),
    ),
    "the first chunks taken for the next ones": (
        *("backward.cuh", "    chunks.load(side, first, size);\n", ""),
        *(two_turns, "plain", "worse than naive"),
    ),
    "a label's part that goes around the softcap": (
        *("backward.cuh", "return value * softcap_slope(", "return value + 0 * softcap_slope("),
        *(softcapped, "plain", "worse than naive"),
    ),
    "no barrier in the sequences' sums": (
        *("sequences.cuh", "  __syncthreads();\n", ""),
        *(sequence_cases, "thread", "data race"),
    ),
    "no barrier before a warp reads the totals": (
        *("sequences.cuh", "  __syncwarp();\n", ""),
        *(sequence_cases, "thread", "data race"),
    ),
    "lanes that leave before the others need them": (
        *("forward.cuh", "  __syncwarp();\n", "  if (threadIdx.x != 0) return;\n"),
        *(many, "plain", "divergence: a barrier that not every thread reaches"),
    ),
    "a sum over half the lanes": (
        *("device.cuh", "int step = kWarp / 2; step > 0; step /= 2) value +="),
        "int step = kWarp / 4; step > 0; step /= 2) value +=",
        *(long, "plain", "worse than naive"),
    ),
    "half the sums over a warp left out": (
        *("device.cuh", "int step = 2; step > 0; step /= 2) sum +=", "int step = 1; step > 0; step /= 2) sum +="),
        *(aligned, "plain", "worse than naive"),
    ),
    "weights that are not checked": (
        *("forward.cuh", "moved || turn.fits(accumulator.most, by)", "moved || true"),
        *(rising, "plain", "worse than naive"),
    ),
    "a turn added before it is checked": (
        *(
            "forward.cuh",
            "        if (!__all_sync(",
            "        turn.add_to(accumulator.sums);\n        if (!__all_sync(",
        ),
        *(rising, "plain", "worse than naive"),
    ),
    "a turn that goes on with the next one's words": (
        *("forward.cuh", "          if (kAligned) load_turn(0);\n", ""),
        *(rising, "plain", "worse than naive"),
    ),
    "a sum of a turn that is left out": (
        *("forward.cuh", "    sums.difference_log += total(difference_log);\n  }", "  }"),
        *(aligned, "plain", "worse than naive"),
    ),
    "half of the pairs left out": (
        *("pairs.cuh", "return pair.first + pair.second;", "return 2 * pair.first;"),
        *(in_pairs, "pairs", "worse than naive"),
    ),
    "exponents above what a polynomial takes": (
        *("pairs.cuh", "larger(smaller(x, 127.0f), -126.0f)", "larger(x, -126.0f)"),
        *(above, "pairs", "worse than naive"),
    ),
    "exponents below what a polynomial takes": (
        *("pairs.cuh", "larger(smaller(x, 127.0f), -126.0f)", "smaller(x, 127.0f)"),
        *(below, "pairs", "worse than naive"),
    ),
    "low entries that nobody sees": (
        *("forward.cuh", " && lowest >= -by.half_limit", ""),
        *(masked, "plain", "Tensor-likes are not close"),
    ),
    "the next turn's loads past the row": (
        *("forward.cuh", "at + 2 * S::kTurn <= size", "at + S::kTurn <= size"),
        *(aligned, "address", "heap-buffer-overflow"),
    ),
    "one entry too many in the tail": (
        *("forward.cuh", "if (offset < left)", "if (offset <= left)"),
        *(odd, "address", "heap-buffer-overflow"),
    ),
    "one entry too many written": (
        *("entries.cuh", "begin + i < size)", "begin + i <= size)"),
        *(misaligned, "plain", "written between the rows|written outside a buffer"),
    ),
    "words around a chunk taken to be inside the row": (
        *("entries.cuh", "begin + kEntries + kAround <= size", "begin + kEntries <= size"),
        *(whole_turns, "address", "use-after-poison|heap-buffer-overflow"),
    ),
    "16 bytes stored wherever a chunk lies": (
        *("entries.cuh", " || bytes_past_boundary(to) != 0", ""),
        *(misaligned, "address", "store to misaligned address"),
    ),
    "ignored rows read": (
        *("forward.cuh", "write_ignored<Real>(a, row);\n    return;\n  }\n  __shared__"),
        "write_ignored<Real>(a, row);\n  }\n  __shared__",
        *(ignored, "address", "use-after-poison"),
    ),
}


# One for each of the plain build's checks; each copy is compiled, which takes seconds.
OFTEN = ("weights that are not checked", "one entry too many written", "lanes that leave before the others need them")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in BREAKAGES]
)
def test_caught(name, build, tmp_path):
    header, right, wrong, cases, variant, report = BREAKAGES[name]
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    replace(copy / "cuda" / header, right, wrong)
    # One dtype is enough, and compiles faster.
    dtype = "BFloat16" if variant == "pairs" else "float"
    replace(copy / "cuda" / "entries.cuh", OTHER_DTYPES, f"    default:\n      return function({dtype}{{}});\n")
    emulator = build(variant, copy)
    check = check_support if cases is masked else run_and_check
    with pytest.raises((EmulationError, AssertionError)) as error:
        check(emulator, cases())
    assert re.search(report, str(error.value)), error.value


def check_support(emulator, cases):
    for case, result in zip(cases, emulator.run(cases), strict=True):
        assert_as_specified(case, result)


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
