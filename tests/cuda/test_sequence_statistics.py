"""The CUDA kernel of sums and means over sequences, run on the host, against the same in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.cuda.comparing import constant
from tests.cuda.emulator import SequenceCase
from tests.helpers import FIELDS

LANES, MANY = constant("sequences.cuh", "kSequenceLanes"), constant("sequences.cuh", "kManySequences")
# The fields of lit_did.SequenceStatistics; all but the first three and the last are means.
SUMS = ("policy_logprob", "reference_logprob", "log_ratio")
MEANS = ("token_did_entropy", "token_did_concentration", "policy_entropy", "reference_entropy", "kl", "reverse_kl")


def packed_case(lengths, dtype=torch.float32, ignore_index=-100, seed=0):
    """Sequences of those lengths, a token in five ignored; what an ignored token holds is NaN."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(offsets[-1])
    statistics = 5 * torch.randn(9, tokens, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(1, 100, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = ignore_index
    statistics[:, labels == ignore_index] = torch.nan
    return SequenceCase(statistics, labels, offsets, ignore_index=ignore_index, seed=seed + 1)


def expected_of(case, begin, end):
    kept = case.labels[begin:end] != case.ignore_index
    tokens = dict(zip(FIELDS, case.statistics[:, begin:end][:, kept].double(), strict=True))
    tokens["log_ratio"] = tokens["policy_logprob"] - tokens["reference_logprob"]
    sums = [tokens[name].sum() for name in SUMS]
    means = [tokens[name].sum() / kept.sum().clamp(min=1) for name in MEANS]
    return torch.stack([*sums, *means, tokens["token_did_log_partition"].sum()]), kept.sum()


def assert_right(case, result, offsets):
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        values, count = expected_of(case, begin, end)
        # Sums in double; then one rounding.
        rtol = 1e-13 if case.statistics.dtype == torch.float64 else 1e-7
        torch.testing.assert_close(result.statistics[:, i].double(), values, rtol=rtol, atol=1e-12)
        assert result.num_tokens[i] == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed(dtype, emulator):
    """Empty sequences, one token, a warp's worth and one, threads with one token, with several, with two turns."""
    case = packed_case([0, 1, 2, 31, 33, 0, LANES, LANES + 1, 3 * LANES - 7, 8 * LANES + 40, 0], dtype)
    (result,) = emulator.run([case])
    assert_right(case, result, case.cu_seqlens.tolist())


@pytest.mark.parametrize("length", [1, 7, LANES, 2 * LANES + 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_length(dtype, length, emulator):
    case = packed_case([length] * 3, dtype, ignore_index=2**40)
    offsets, case.cu_seqlens, case.length = case.cu_seqlens.tolist(), None, length
    (result,) = emulator.run([case])
    assert_right(case, result, offsets)


def test_only_ignored_tokens(emulator):
    case = packed_case([40, 5])
    case.labels[:40] = -100
    case.statistics[:, :40] = torch.nan
    (result,) = emulator.run([case])
    assert (result.statistics[:, 0] == 0).all()
    assert result.num_tokens[0] == 0
    assert_right(case, result, [0, 40, 45])


def test_no_sequences(emulator):
    case = SequenceCase(torch.zeros(9, 0), torch.zeros(0, dtype=torch.int64), torch.tensor([0]))
    (result,) = emulator.run([case])
    assert result.statistics.shape == (10, 0)


def test_offsets_beyond_the_tokens(emulator):
    """Nothing can be raised on a device: they count as the first or the last."""
    case = packed_case([50, 50])
    case.cu_seqlens = torch.tensor([-3, 50, 2**40])
    (result,) = emulator.run([case])
    assert_right(case, result, [0, 50, 100])


def test_same_bits_alone_or_in_a_batch(emulator):
    """Wherever the sequence lies, packed or not, in whatever order threads run."""
    length = 5 * LANES + 300
    batch = packed_case([17, length, 5])
    rows = slice(17, 17 + length)
    alone = SequenceCase(batch.statistics[:, rows], batch.labels[rows], None, length=length, seed=9)
    among_many = packed_case([length] + [0] * MANY)
    among_many.statistics, among_many.labels = alone.statistics, alone.labels
    in_batch, result, first = emulator.run([batch, alone, among_many])
    assert torch.equal(result.statistics[:, 0], in_batch.statistics[:, 1])
    assert torch.equal(result.statistics[:, 0], first.statistics[:, 0])
