"""Two half-precision entries at a time, as the forward adds them on sm_100, and the polynomials among its exponentials.

The same tests that the other path passes, with the kernels built for pairs.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cuda import test_determinism, test_slices, test_support, test_token_statistics
from tests.cuda.comparing import PAIRS, random_case, run_and_check
from tests.cuda.emulator import BUILDS, CSRC, FLAGS, why_not

HALVES = [pair for pair in PAIRS if set(pair) <= {"bf16", "f16"}]
halves = pytest.mark.parametrize("pair", HALVES, ids="-".join)
two_halves = pytest.mark.parametrize("pair", [("bf16", "bf16"), ("f16", "bf16")], ids="-".join)


@pytest.fixture(scope="session")
def emulator(build):
    return build("pairs")


# ----------------------------------------------------------------------------------------------------------
# The polynomial
# ----------------------------------------------------------------------------------------------------------


def test_polynomial(tmp_path):
    """Against float64, over the whole range."""
    if reason := why_not("pairs"):
        pytest.skip(reason)
    program, source = tmp_path / "polynomial_error", Path(__file__).parent / "polynomial_error.cpp"
    flags = [*FLAGS, *BUILDS["pairs"], "-O3", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.check_call(["g++", *flags, f"-I{CSRC / 'cuda'}", str(source), "-o", str(program)])
    error, wrong = subprocess.check_output([str(program)], text=True).split()
    assert 1e-8 < float(error) < 1.5e-7  # a sweep that finds nothing has swept nothing
    assert wrong == "0"


# ----------------------------------------------------------------------------------------------------------
# The forward
# ----------------------------------------------------------------------------------------------------------


@halves
def test_values_and_gradients(pair, emulator):
    test_token_statistics.test_values_and_gradients(pair, emulator)
    test_token_statistics.test_temperature(pair, emulator)
    test_slices.test_parts_of_a_slice(pair, emulator)


def test_only_half_precision_is_added_in_pairs(build, emulator):
    """The other sums' order is the other path's: the same bits."""
    for pair in PAIRS:
        case = random_case(2, 2061, pair, upstream=None)
        (ours,), (other,) = emulator.run([case]), build("plain").run([case])
        assert torch.equal(ours.statistics, other.statistics) == (pair not in HALVES)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_peaks(dtype, emulator):
    """Weights from far below the smallest that a polynomial gives to far above the largest, roll-backs in between."""
    test_token_statistics.test_peaked(dtype, emulator)
    test_token_statistics.test_a_peak_anywhere_in_a_turn(dtype, emulator)
    test_token_statistics.test_origins_seldom_move(dtype, emulator)
    case = random_case(8, 4099, (dtype, dtype))
    case.policy, case.reference = case.policy * 30, case.reference.flip(-1) * 30
    run_and_check(emulator, [case, replace(case, policy=case.reference, reference=case.policy)])


@two_halves
@pytest.mark.parametrize("place", test_support.PLACES)
def test_as_the_specification(place, pair, emulator):
    test_support.test_as_the_specification(place, pair, emulator)


@pytest.mark.parametrize("value", [-1e9, -1e5, -torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_any_place_in_a_turn(side, value, emulator):
    """A value that counts as infinite, or is far from the others, stands once at each place of the second turn."""
    rows = 16
    case = random_case(rows, 1024, ("bf16", "bf16"))
    places = 512 + torch.arange(rows) % 8 + 256 * (torch.arange(rows) // 8)
    logits = case.policy if side == "policy" else case.reference
    logits[torch.arange(rows), places] = value
    case.labels[:] = 0
    (result,) = emulator.run([case])
    test_support.assert_as_specified(case, result)


@two_halves
def test_the_same_bits(pair, emulator):
    test_determinism.test_any_address(pair, emulator)
    test_determinism.test_alone_or_in_a_batch(1001, pair, emulator)
    test_determinism.test_any_number_of_rows(pair, 3, emulator)
